package cri

import (
	"errors"
	"io"
	"sync"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// execSession is one Exec call of the Node service as the streams of an exec.
type execSession struct {
	stream nodeapi.Node_ExecStreamServer
	mu     sync.Mutex // serialises Send
	sizes  chan [2]uint16
}

func (e *execSession) send(m *nodeapi.ExecResponse) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.stream.Send(m)
}

type execOutput func(p []byte) *nodeapi.ExecResponse

type execWriter struct {
	session *execSession
	message execOutput
}

func (w execWriter) Write(p []byte) (int, error) {
	if err := w.session.send(w.message(p)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// resize tells the newest size; one that nobody has taken yet is out of date.
// It has one caller at a time.
func (e *execSession) resize(m *nodeapi.ExecRequest) {
	select {
	case <-e.sizes:
	default:
	}
	e.sizes <- [2]uint16{uint16(m.GetWidth()), uint16(m.GetHeight())}
}

// receive hands the client's messages on until it is gone.
func (e *execSession) receive(stdin *io.PipeWriter) {
	defer close(e.sizes)
	for {
		m, err := e.stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil // the client has nothing more to say
			}
			_ = stdin.CloseWithError(err)
			return
		}
		if m.GetWidth() > 0 && m.GetHeight() > 0 {
			e.resize(m)
		}
		if len(m.GetData()) > 0 {
			if _, err := stdin.Write(m.GetData()); err != nil {
				continue // the command has closed its stdin
			}
		}
		if m.GetEof() {
			_ = stdin.Close()
		}
	}
}

// ExecStream runs a command for the command line; see node.proto.
func (s *Server) ExecStream(stream nodeapi.Node_ExecStreamServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if len(first.GetCmd()) == 0 {
		return refuse("cmd", "is empty")
	}
	if err := s.checkRunning(first.GetContainerId()); err != nil {
		return err
	}
	e := &execSession{stream: stream, sizes: make(chan [2]uint16, 1)}
	r, w := io.Pipe()
	defer r.Close() // frees receive when the command ends first
	if first.GetWidth() > 0 && first.GetHeight() > 0 {
		e.resize(first)
	}
	go e.receive(w)
	stdio := execIO{
		tty: first.GetTty(),
		out: execWriter{e, func(p []byte) *nodeapi.ExecResponse { return &nodeapi.ExecResponse{Stdout: p} }},
		err: execWriter{e, func(p []byte) *nodeapi.ExecResponse { return &nodeapi.ExecResponse{Stderr: p} }},
		resize: func(set func(w, h uint16)) {
			for sz := range e.sizes {
				set(sz[0], sz[1])
			}
		},
	}
	if first.GetStdin() {
		stdio.in = r
		if first.GetTty() {
			stdio.in = readAhead(stream.Context(), r)
		}
	}
	code, err := s.exec(stream.Context(), first.GetContainerId(), &guestapi.ExecRequest{
		Args: first.GetCmd(), Width: first.GetWidth(), Height: first.GetHeight(),
	}, stdio)
	if err != nil {
		return err
	}
	return e.send(&nodeapi.ExecResponse{Exited: true, ExitCode: code})
}
