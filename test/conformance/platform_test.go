//go:build linux && !fakevz

package conformance_test

import "github.com/cri-vz/cri-vz/test/testnode"

func platform(string, string) (guests string, settings []string, err error) { return "", nil, nil }

// settle waits for what outlives the last pod, which is nothing here.
func settle(*testnode.Daemon) error { return nil }
