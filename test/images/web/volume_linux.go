package main

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

func init() {
	commands["map-write"], commands["lock"] = mapWrite, lock
}

// mapWrite FILE TEXT writes by a shared mapping and leaves it to others to sync it.
func mapWrite(args []string) (int, error) {
	if len(args) != 2 {
		return 2, errUsage
	}
	f, err := os.OpenFile(args[0], os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return 1, err
	}
	defer f.Close()
	if err := f.Truncate(int64(len(args[1]))); err != nil {
		return 1, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, len(args[1]), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return 1, err
	}
	copy(m, args[1])
	return 0, nil
}

// lock FILE takes a lock that nobody else may have.
func lock(args []string) (int, error) {
	if len(args) != 1 {
		return 2, errUsage
	}
	f, err := os.Open(args[0])
	if err != nil {
		return 1, err
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return 1, errors.New("locked")
	}
	return 0, err
}
