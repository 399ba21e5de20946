//go:build (darwin && cgo && arm64) || fakevz

package vz

import "github.com/Code-Hex/vz/v3"

// rosettaState tells whether amd64 programs can run in arm64 guests, and why not.
func rosettaState() (ok bool, reason string) {
	switch vz.LinuxRosettaDirectoryShareAvailability() {
	case vz.LinuxRosettaAvailabilityInstalled:
		return true, ""
	case vz.LinuxRosettaAvailabilityNotInstalled:
		return false, "it is not installed: run `softwareupdate --install-rosetta`"
	}
	return false, "this Mac has none"
}

// rosettaShare is the directory with Rosetta for Linux.
func rosettaShare() (vz.DirectoryShare, error) {
	s, err := vz.NewLinuxRosettaDirectoryShare()
	if err != nil {
		return nil, err // and not s: a nil of its type is not nil
	}
	return s, nil
}
