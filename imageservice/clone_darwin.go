package imageservice

import (
	"errors"
	"os"
)

// cloneFile always fails: APFS clones within one volume only, where a hard link
// has been made already, and into a new name rather than an open file.
func cloneFile(_, _ *os.File) error { return errors.ErrUnsupported }
