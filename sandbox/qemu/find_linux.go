package qemu

// FindQEMU is the path of the QEMU that machines of arch would run; errdefs.ErrNotFound
// if there is none.
func FindQEMU(o Options, arch string) (string, error) { return newDriver(o).binary(arch) }

// FindVirtiofsd is the path of the virtiofsd that machines would run;
// errdefs.ErrNotFound if there is none.
func FindVirtiofsd(o Options) (string, error) {
	v, err := findVirtiofsd(o.VirtiofsdPath)
	return v.path, err
}
