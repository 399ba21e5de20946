package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// fakeQMP answers each request with what answer returns for it.
func fakeQMP(t *testing.T, answer func(id uint64, command string) string, onEvent func(qmpEvent)) *qmpClient {
	t.Helper()
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		fmt.Fprintln(far, `{"QMP": {"version": {}, "capabilities": []}}`)
		in := bufio.NewScanner(far)
		for in.Scan() {
			var r struct {
				ID      uint64 `json:"id"`
				Execute string `json:"execute"`
			}
			if json.Unmarshal(in.Bytes(), &r) != nil {
				return
			}
			text := answer(r.ID, r.Execute)
			if text == "hang up" {
				return
			}
			if _, err := fmt.Fprint(far, text); err != nil {
				return
			}
		}
	}()
	c := newQMPClient(near, onEvent)
	t.Cleanup(c.close)
	return c
}

func TestQMP(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreTopFunction("github.com/cri-vz/cri-vz/sandbox/qemu.startChildren"))
	t.Run("commands", func(t *testing.T) {
		events := make(chan string, 10)
		c := fakeQMP(t, func(id uint64, command string) string {
			switch command {
			case "query-status":
				return fmt.Sprintf("\n{\"event\": \"RESUME\", \"data\": {}}\n{\"return\": {}, \"id\": 999}\n{\"return\": {\"status\": \"running\"}, \"id\": %d}\n", id)
			case "bad-type":
				return fmt.Sprintf("{\"return\": [], \"id\": %d}\n", id)
			case "silence":
				return ""
			case "huge":
				return strings.Repeat("x", qmpLineLimit+1)
			}
			return fmt.Sprintf("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\\n%s\"}, \"id\": %d}\n", command, id)
		}, func(e qmpEvent) { events <- e.Name })
		var out struct {
			Status string `json:"status"`
		}
		if err := c.execute(t.Context(), "query-status", map[string]any{"a": 1}, &out); err != nil || out.Status != "running" {
			t.Errorf("%+v, %v", out, err)
		}
		if e := <-events; e != "RESUME" {
			t.Errorf("event %s", e)
		}
		// What QEMU says is quoted.
		if err := c.execute(t.Context(), "none", nil, nil); err == nil || !strings.Contains(err.Error(), `CommandNotFound: "no\nnone"`) {
			t.Errorf("unknown command: %v", err)
		}
		if err := c.execute(t.Context(), "bad-type", nil, &out); err == nil {
			t.Error("a result of the wrong type is accepted")
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := c.execute(ctx, "silence", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("no answer: %v", err)
		}
		if err := c.execute(t.Context(), "huge", nil, nil); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("a message without end: %v", err)
		}
		if err := c.execute(t.Context(), "query-status", nil, nil); err == nil {
			t.Error("the connection survived")
		}
	})
	t.Run("qemu exits", func(t *testing.T) {
		c := fakeQMP(t, func(uint64, string) string { return "hang up" }, func(qmpEvent) {})
		if err := c.execute(t.Context(), "query-status", nil, nil); !errors.Is(err, errQMPClosed) {
			t.Errorf("%v, want errQMPClosed", err)
		}
	})
}

func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}`))
	f.Add([]byte(`{"timestamp": {"seconds": 1}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}`))
	f.Add([]byte("{\"return\": {}, \"id\": 1}\n{\"error\": {\"class\": 1}}\n"))
	f.Add([]byte(`{"event": "BLOCK_IO_ERROR", "data": []}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &machine{}
		err := readQMP(strings.NewReader(string(b)), func(msg qmpMessage) {
			if msg.Event != "" {
				m.event(qmpEvent{Name: msg.Event, Data: msg.Data})
			} else {
				_ = msg.result("x", &struct{}{})
			}
		})
		if err == nil {
			t.Error("readQMP returned nil")
		}
	})
}
