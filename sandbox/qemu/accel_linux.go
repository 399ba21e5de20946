package qemu

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

const kvmDevice = "/dev/kvm"

// initStarted is what Linux prints when it has booted as far as its first program.
// A guest that only prints something has not shown that KVM works: where KVM is
// nested or paravirtual, kernels are known to stop half-way.
const initStarted = "as init process"

// probe is the attempt to boot with KVM, shared by all who wait for it.
type probe struct {
	done chan struct{}
	err  error // why KVM doesn't work; of a context if nobody knows
	told bool  // the fall-back is in the log; guarded by driver.mu
}

// proveKVM returns nil if a guest boots with KVM. It is found out once for a driver
// and, with a cache directory, once for a kernel of the host, QEMU and guest kernel.
func (d *driver) proveKVM(ctx context.Context, arch, kernel, initrd string) error {
	if kernel == "" {
		return errors.New("no kernel was given to prove it with")
	}
	d.mu.Lock()
	p := d.probes[arch]
	mine := p == nil
	if mine {
		p = &probe{done: make(chan struct{})}
		d.probes[arch] = p
	}
	d.mu.Unlock()
	if mine {
		p.err = d.cachedProbe(ctx, arch, kernel, initrd)
		if ctx.Err() != nil { // the next who asks tries again
			d.mu.Lock()
			delete(d.probes, arch)
			d.mu.Unlock()
		}
		close(p.done)
		return p.err
	}
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// noteFallback logs once for each architecture why KVM is not used.
func (d *driver) noteFallback(arch string, err error) {
	d.mu.Lock()
	p := d.probes[arch]
	if p == nil {
		p = &probe{done: make(chan struct{}), err: err}
		close(p.done)
		d.probes[arch] = p
	}
	told := p.told
	p.told = true
	d.mu.Unlock()
	if !told {
		klog.InfoS("KVM is not used, guests are emulated", "arch", arch, "reason", err)
	}
}

// verdict is the content of a file in the cache directory.
type verdict struct {
	// Reason is why KVM doesn't work; empty if it does.
	Reason string    `json:"reason"`
	Time   time.Time `json:"time"`
}

// verdictLimit caps what is read back.
const verdictLimit = 64 << 10

func (d *driver) cachedProbe(ctx context.Context, arch, kernel, initrd string) error {
	file := ""
	if d.opts.CacheDir != "" {
		key, err := d.probeKey(arch, kernel)
		if err != nil {
			return err
		}
		file = filepath.Join(d.opts.CacheDir, "kvm-"+key+".json")
		if v, err := readVerdict(file); err == nil {
			if v.Reason == "" {
				return nil
			}
			return fmt.Errorf("%s (found out on %s; remove %s to try again)", v.Reason, v.Time.Format(time.RFC3339), file)
		}
	}
	start := time.Now()
	err := d.probeKVM(ctx, arch, kernel, initrd)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	klog.InfoS("Tried to boot a guest with KVM", "arch", arch, "works", err == nil, "err", err, "took", time.Since(start))
	if file == "" {
		return err
	}
	v := verdict{Time: time.Now().UTC()}
	if err != nil {
		v.Reason = err.Error()
	}
	if werr := writeVerdict(file, v); werr != nil {
		klog.ErrorS(werr, "KVM will be tried again next time")
	}
	return err
}

// probeKey changes with whatever may change the verdict.
func (d *driver) probeKey(arch, kernel string) (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	binary, err := d.binary(arch)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s %s uid=%d\n", unix.ByteSliceToString(u.Release[:]), unix.ByteSliceToString(u.Version[:]), d.opts.UID)
	for _, p := range []string{binary, kernel, d.kvm} {
		st, err := os.Stat(p)
		if err != nil {
			return "", err
		}
		stamp := st.ModTime()
		if p == d.kvm {
			stamp = time.Time{} // changes with each use
		}
		fmt.Fprintf(h, "%q %d %s %s\n", p, st.Size(), st.Mode(), stamp.UTC())
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

func readVerdict(file string) (v verdict, err error) {
	st, err := os.Stat(file)
	if err != nil {
		return v, err
	}
	if st.Size() > verdictLimit {
		return v, fmt.Errorf("%s has %d bytes", file, st.Size())
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(b, &v)
}

func writeVerdict(file string, v verdict) (err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it is renamed
	_, err = f.Write(append(b, '\n'))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

// probeKVM boots a guest with KVM until it starts its first program.
func (d *driver) probeKVM(ctx context.Context, arch, kernel, initrd string) (err error) {
	bounded, cancel := context.WithTimeout(ctx, d.probeTimeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "kvm")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	defer write.Close()

	opts := d.opts
	opts.Accel = AccelKVM
	prober := newDriver(opts)
	prober.kvm = d.kvm
	m, err := prober.New(bounded, vmm.Config{
		ID: "kvm-probe", Arch: arch, Kernel: kernel, Initrd: initrd, Cmdline: "panic=-1",
		CPUs: 1, MemoryBytes: 512 << 20, Console: write, RunDir: dir,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := m.Start(bounded); err != nil {
		return err
	}
	booted := make(chan struct{})
	lines := make(chan int, 1)
	go func() {
		in := bufio.NewReaderSize(read, 4096)
		n := 0
		for {
			// A line that is too long comes in parts, which is well enough here.
			line, _, err := in.ReadLine()
			if err != nil {
				lines <- n
				return
			}
			n++
			if strings.Contains(string(line), initStarted) {
				close(booted)
				lines <- n
				return
			}
		}
	}()
	select {
	case <-booted:
		return nil
	case <-m.Done():
		return fmt.Errorf("a guest died while it booted with KVM: %w", m.Err())
	case <-bounded.Done():
		_ = read.Close() // ends the reader, whose count says how far the guest got
		return fmt.Errorf("a guest did not boot with KVM within %s: its console has %d lines", d.probeTimeout, <-lines)
	}
}
