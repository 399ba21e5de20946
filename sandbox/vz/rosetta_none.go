//go:build darwin && cgo && !arm64 && !fakevz

package vz

import (
	"errors"

	"github.com/Code-Hex/vz/v3"
)

func rosettaState() (bool, string) { return false, "an Intel Mac runs amd64 programs as they are" }

func rosettaShare() (vz.DirectoryShare, error) {
	return nil, errors.New("Rosetta is for Apple silicon")
}
