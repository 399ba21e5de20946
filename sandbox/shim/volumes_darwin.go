package shim

func newVolumes(c Config) volumes { return newLiveVolumes(c) }
