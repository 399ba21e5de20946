//go:build (darwin && cgo) || fakevz

package vz

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// firstMacOS is the first version whose framework has all that the driver can't do
// without: the MTU of a NIC came last.
const firstMacOS = 13.0

// Features asks the running macOS for what is optional.
func Features() ([]Feature, error) {
	version, err := macOSVersion()
	if err != nil {
		return nil, err
	}
	live := Feature{Name: FeatureLiveShares, MacOS: 12, Available: version >= 12}
	if err := canSetShare(); live.Available && err != nil {
		live.Available, live.Reason = false, err.Error()
	}
	rosetta := Feature{Name: FeatureRosetta, MacOS: 13}
	rosetta.Available, rosetta.Reason = rosettaState()
	features := []Feature{live, rosetta}
	for i, f := range features {
		if !f.Available && version < f.MacOS {
			features[i].Reason = fmt.Sprintf("this is macOS %g, it takes %g", version, f.MacOS)
		}
	}
	return features, nil
}

func available(name string) bool {
	features, err := Features()
	if err != nil {
		return false
	}
	for _, f := range features {
		if f.Name == name {
			return f.Available
		}
	}
	return false
}

// macOSVersion is the major version and the minor one as a fraction, 12.3, which is
// how vz asks for it.
func macOSVersion() (float64, error) {
	s, err := productVersion()
	if err != nil {
		return 0, fmt.Errorf("ask for the version of macOS: %w", err)
	}
	major, rest, _ := strings.Cut(s, ".")
	minor, _, _ := strings.Cut(rest, ".")
	if minor == "" {
		minor = "0"
	}
	v, err := strconv.ParseFloat(major+"."+minor, 64)
	if err != nil || v == 0 {
		return 0, fmt.Errorf("version %q of macOS is none that is known: %w", s, errdefs.ErrUnknown)
	}
	return v, nil
}

func checkMacOS() error {
	v, err := macOSVersion()
	if err != nil {
		return err
	}
	if v < firstMacOS {
		return fmt.Errorf("vz: this is macOS %g, virtual machines take %g or later: %w", v, firstMacOS, errdefs.ErrFailedPrecondition)
	}
	return nil
}
