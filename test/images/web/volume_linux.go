package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func init() {
	commands["watch"], commands["map-write"], commands["lock"] = watch, mapWrite, lock
}

// watch FILE LAST reads FILE, which holds a number, over and over until it is LAST.
// A read that fails, or a number that is smaller than the one before, is an error.
func watch(args []string) (int, error) {
	if len(args) != 2 {
		return 2, errUsage
	}
	last, reads, seen := -1, 0, 0
	for {
		b, err := os.ReadFile(args[0])
		if err != nil {
			return 1, fmt.Errorf("after %d reads: %w", reads, err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || n < last {
			return 1, fmt.Errorf("after %d reads: %q follows %d", reads, b, last)
		}
		reads++
		if n != last {
			seen++
			if last < 0 {
				fmt.Println("watching")
			}
		}
		if last = n; args[1] == strconv.Itoa(n) {
			fmt.Printf("%d reads, %d values\n", reads, seen)
			return 0, nil
		}
	}
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
