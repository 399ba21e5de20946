package traffic

import (
	"io"
	"net"
	"testing"
)

func TestTraffic(t *testing.T) {
	near, far := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- Serve(far) }()
	const n = 3*bufferSize + 17
	for _, step := range []func() error{
		func() error { return Ping(near) },
		func() error { return Send(near, n) },
		func() error { return Receive(near, n) },
		func() error { return Ping(near) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	near.Close()
	if err := <-served; err != nil && err != io.ErrClosedPipe {
		t.Fatal(err)
	}
}
