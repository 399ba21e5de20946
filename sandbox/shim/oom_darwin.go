package shim

// setOOMScoreAdj does nothing: macOS has no such preference to set for others.
func setOOMScoreAdj(int, int) error { return nil }
