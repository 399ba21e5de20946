//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// isClosed says that a connection ended without violence.
func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}

// podClient is PID 1's side of pod-init. Its methods may be called concurrently.
type podClient struct {
	pid  int
	conn *packetConn
	// gone is closed when pod-init has ended.
	gone chan struct{}

	sendMu sync.Mutex // serialises sends

	mu      sync.Mutex // guards what follows
	seq     uint64
	replies map[uint64]chan podReply
	exits   map[uint64]func(unix.WaitStatus, time.Time)
	lost    bool
}

type podReply struct {
	steps []namedStep
	pidfd *os.File
	err   error
}

// startPodInit forks pod-init from the binary at exe into new namespaces: IPC, UTS and
// network ones if apart, a pid one if sharedPID, and a user one, which owns the others,
// if ids are mapped.
func startPodInit(r *reaper, exe string, apart, sharedPID bool, ids *idMaps) (*podClient, error) {
	conn, child, err := packetPair()
	if err != nil {
		return nil, err
	}
	defer child.Close()
	var flags uintptr
	if apart {
		flags |= unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET
	}
	if sharedPID {
		flags |= unix.CLONE_NEWPID
	}
	sys := &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}
	if ids != nil {
		sys.Cloneflags |= unix.CLONE_NEWUSER
		sys.UidMappings, sys.GidMappings, sys.GidMappingsEnableSetgroups = ids.uids, ids.gids, true
		sys.Credential = &syscall.Credential{} // root of the new namespace
	}
	p := &podClient{
		conn:    conn,
		gone:    make(chan struct{}),
		replies: map[uint64]chan podReply{},
		exits:   map[uint64]func(unix.WaitStatus, time.Time){},
	}
	p.pid, err = r.start(func() (int, error) {
		return syscall.ForkExec(exe, []string{"cri-vz-agent", RolePodInit}, &syscall.ProcAttr{
			Dir:   "/",
			Env:   []string{},
			Files: []uintptr{0, 1, 2, child.Fd()},
			Sys:   sys,
		})
	}, func(unix.WaitStatus, time.Time) { close(p.gone) })
	if err != nil {
		conn.close()
		return nil, fmt.Errorf("fork pod-init: %w", err)
	}
	go p.receive()
	return p, nil
}

// receive runs until pod-init closes its end.
func (p *podClient) receive() {
	for {
		m, fds, err := p.conn.receive()
		if err != nil {
			p.fail(fmt.Errorf("pod-init is gone: %w", err))
			return
		}
		p.mu.Lock()
		reply := p.replies[m.Seq]
		exit := p.exits[m.Seq]
		switch m.Op {
		case opReply:
			delete(p.replies, m.Seq)
			exit = nil
		case opExit:
			delete(p.exits, m.Seq)
			reply = nil
		default:
			reply, exit = nil, nil
		}
		p.mu.Unlock()
		if exit != nil {
			exit(unix.WaitStatus(m.Status), time.Unix(0, m.At))
		}
		if reply != nil {
			r := podReply{steps: m.Steps}
			if m.Error != "" {
				r.err = errorOf(m.Class, m.Error)
			} else if len(fds) == 1 {
				r.pidfd = os.NewFile(uintptr(fds[0]), "pidfd")
				fds = nil
			}
			reply <- r
		}
		closeAll(fds)
	}
}

// fail answers all that wait: processes whose parent is gone are dead or no
// longer ours to tell about.
func (p *podClient) fail(err error) {
	p.mu.Lock()
	replies, exits := p.replies, p.exits
	p.replies, p.exits, p.lost = nil, nil, true
	p.mu.Unlock()
	for _, r := range replies {
		r <- podReply{err: unavailablef("%w", err)}
	}
	for _, exit := range exits {
		exit(unix.WaitStatus(255<<8), time.Now())
	}
}

// call sends m and waits for its reply. exit, if any, is called once with the
// end of the process that m starts, possibly before call returns.
func (p *podClient) call(ctx context.Context, m *message, exit func(unix.WaitStatus, time.Time), fds ...int) (podReply, error) {
	reply := make(chan podReply, 1)
	p.mu.Lock()
	if p.lost {
		p.mu.Unlock()
		return podReply{}, unavailablef("pod-init is gone")
	}
	p.seq++
	m.Seq = p.seq
	p.replies[m.Seq] = reply
	if exit != nil {
		p.exits[m.Seq] = exit
	}
	p.mu.Unlock()

	p.sendMu.Lock()
	err := p.conn.send(m, fds...)
	p.sendMu.Unlock()
	if err != nil {
		p.forget(m.Seq)
		return podReply{}, fmt.Errorf("ask pod-init to %s: %w", m.Op, err)
	}
	select {
	case r := <-reply:
		if r.err != nil {
			p.forget(m.Seq)
		}
		return r, r.err
	case <-ctx.Done():
		// A late reply's pidfd is closed as nobody's.
		p.forget(m.Seq)
		return podReply{}, fmt.Errorf("wait for pod-init to %s: %w", m.Op, ctx.Err())
	}
}

func (p *podClient) forget(seq uint64) {
	p.mu.Lock()
	delete(p.replies, seq)
	delete(p.exits, seq)
	p.mu.Unlock()
}
