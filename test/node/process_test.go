//go:build linux

package node_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// program is one of the node's, with its log in bin/test-node.
type program struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// logs lies in the check-out, so that it outlives the test.
const logs = "../../bin/test-node"

func logFile(name string) string { return filepath.Join(logs, name) }

// startProgram starts a program; ready is asked until it answers nil.
func startProgram(name, path string, args []string, bound time.Duration, ready func() error) (*program, error) {
	out, err := os.OpenFile(logFile(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &program{name: name, cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	// Ctrl-C on the terminal is the test's business.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	for deadline := time.Now().Add(bound); ; {
		err := ready()
		if err == nil {
			return p, nil
		}
		select {
		case <-p.done:
			return nil, fmt.Errorf("%s ended with %v; the last lines of its log:\n%s", name, p.cmd.ProcessState, tail(logFile(name), 15))
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%s was not ready within %v: %w (stopped: %v); the last lines of its log:\n%s", name, bound, err, p.stop(), tail(logFile(name), 15))
		}
	}
}

// stop ends the program as a service manager does, and insists after 15 s.
func (p *program) stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	const bound = 15 * time.Second
	select {
	case <-p.done:
		return nil
	case <-time.After(bound):
		p.kill()
		return fmt.Errorf("%s did not end within %v", p.name, bound)
	}
}

// kill ends the program as a crash does.
func (p *program) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

func tail(path string, lines int) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}

// printLogs shows the end of each program's log.
func printLogs() {
	all, _ := filepath.Glob(logFile("*"))
	for _, l := range all {
		fmt.Fprintf(os.Stderr, "--- %s\n%s\n", filepath.Base(l), strings.ToValidUTF8(tail(l, 25), "?"))
	}
}
