package frameswitch

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// pidOf reads from the log who serves, after it was told so often.
func pidOf(t *testing.T, p Process, times int) int {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(filepath.Join(p.StateDir, logFile))
		if parts := strings.Split(string(b), "pid="); err == nil && len(parts) > times {
			number, _, ok := strings.Cut(parts[times], "\n")
			if pid, err := strconv.Atoi(number); ok && err == nil {
				return pid
			}
		}
		if time.Now().After(end) {
			t.Fatalf("no switch serves for the %d. time: %v: %s", times, err, b)
		}
	}
}

// The process is one, is replaced when it was killed, with the ports that it had, and
// ends when there are none.
func TestProcess(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := Process{Command: []string{self, "switch"}, Socket: filepath.Join(dir, "s"), StateDir: dir}
	for range 3 {
		if err := p.Ensure(); err != nil {
			t.Fatal(err)
		}
	}
	first := pidOf(t, p, 1)
	a, b := join(t, p.Socket, macA), join(t, p.Socket, macB)
	a.send(frame(macB, macA, "by the first"))
	b.expect("by the first")
	if st, err := os.Stat(p.Socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}

	// Longer than it lives without ports.
	time.Sleep(idleEnd + time.Second)
	if err := p.Ensure(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatalf("the first switch has ended by itself: %v", err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if lock, err := takeLock(dir); err != nil {
			t.Fatal(err)
		} else if lock != nil {
			lock.Close()
			break
		}
		if time.Now().After(end) {
			t.Fatal("a killed switch keeps its lock")
		}
	}
	if err := p.Ensure(); err != nil {
		t.Fatal(err)
	}
	second := pidOf(t, p, 2)
	if second == first {
		t.Fatal("the killed one serves")
	}
	rejoined(t, a, b)

	time.Sleep(idleEnd / 3) // it has seen them
	a.port.Close()
	b.port.Close()
	for end := time.Now().Add(idleEnd + 10*time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err = os.Stat(p.Socket); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a switch that nobody needs is still there: %v", err)
		}
	}
	// Its end is waited for by who started it: this process. The race detector takes a
	// second for it.
	for end := time.Now().Add(10 * time.Second); !errors.Is(syscall.Kill(second, 0), syscall.ESRCH); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a switch that has closed its socket goes on")
		}
	}
}
