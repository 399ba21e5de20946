//go:build linux

// Command scratch makes the template of the scratch disk that sandbox/scratch
// embeds: mkfs.ext4 on a sparse file, of which the blocks that aren't zero are
// kept.
//
//	go run ./hack/scratch sandbox/scratch/template.gz
//
// Equal versions of e2fsprogs make equal templates.
package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/cri-vz/cri-vz/sandbox/scratch"
	"golang.org/x/sys/unix"
)

// uuid is that of every scratch disk, and the seed of its directory hashes.
const uuid = "6372692d-767a-4000-8000-736372617463"

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: scratch FILE")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintf(os.Stderr, "scratch: %v\n", err)
		os.Exit(1)
	}
}

func run(out string) error {
	dir, err := os.MkdirTemp("", "scratch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk")
	disk, err := os.Create(path)
	if err != nil {
		return err
	}
	defer disk.Close()
	if err := disk.Truncate(scratch.Size); err != nil {
		return err
	}
	// lazy_itable_init=0: on a sparse file that costs nothing here, and it
	// saves the guest's kernel from zeroing the tables. No backups, because a
	// disk of 64 GiB has 200 KiB of them. Project quotas: T15.
	mkfs := exec.Command("mkfs.ext4", "-q", "-F", "-t", "ext4", "-b", fmt.Sprint(scratch.BlockSize), "-m", "0", "-I", "256", "-i", "16384",
		"-U", uuid, "-L", "cri-vz-scratch",
		"-E", "lazy_itable_init=0,hash_seed="+uuid+",root_owner=0:0,nodiscard,quotatype=prjquota,num_backup_sb=0",
		"-O", "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,large_file,huge_file,dir_nlink,extra_isize,metadata_csum,sparse_super2,project,quota", path)
	// A host's mke2fs.conf must not change the result, nor must the clock.
	mkfs.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1", "MKE2FS_CONFIG=/dev/null")
	if text, err := mkfs.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4 (package e2fsprogs): %w: %s", err, text)
	}
	next := func(offset int64) (start, end int64, ok bool) {
		start, err := unix.Seek(int(disk.Fd()), offset, unix.SEEK_DATA)
		if err != nil {
			return 0, 0, false
		}
		end, err = unix.Seek(int(disk.Fd()), start, unix.SEEK_HOLE)
		return start, end, err == nil
	}
	var packed bytes.Buffer
	if err := scratch.Pack(&packed, disk, next); err != nil {
		return err
	}
	return os.WriteFile(out, packed.Bytes(), 0o644)
}
