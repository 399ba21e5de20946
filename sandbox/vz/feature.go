package vz

// Names of features.
const (
	FeatureLiveShares = "live shares"
	// FeatureRosetta: arm64 guests run programs for amd64, too.
	FeatureRosetta = "Rosetta"
)

// Feature is something that the driver does where the running macOS can.
type Feature struct {
	Name string
	// MacOS is the first version that has it.
	MacOS float64
	// Available is whether it is to be had here and now.
	Available bool
	// Reason says why not, and what to do.
	Reason string
}
