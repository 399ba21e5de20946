package crilog

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type entry struct{ stream, tag, content string }

func parse(t testing.TB, b []byte) []entry {
	t.Helper()
	var es []entry
	for l := range strings.Lines(string(b)) {
		if !strings.HasSuffix(l, "\n") {
			t.Fatalf("unfinished line %q", l)
		}
		f := strings.SplitN(strings.TrimSuffix(l, "\n"), " ", 4)
		if len(f) != 4 {
			t.Fatalf("not a CRI log line: %q", l)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Fatal(err)
		}
		es = append(es, entry{f[1], f[2], f[3]})
	}
	return es
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	tests := []struct {
		name   string
		writes []string
		want   []entry
	}{
		{"one line", []string{"hello\n"}, []entry{{"stdout", "F", "hello"}}},
		{"empty lines", []string{"\n\n"}, []entry{{"stdout", "F", ""}, {"stdout", "F", ""}}},
		{"line in pieces", []string{"he", "ll", "o\nwor", "ld\n"}, []entry{{"stdout", "F", "hello"}, {"stdout", "F", "world"}}},
		{"no newline at the end", []string{"a\nb"}, []entry{{"stdout", "F", "a"}, {"stdout", "P", "b"}}},
		{"longest whole line", []string{long, "\n"}, []entry{{"stdout", "F", long}}},
		{"one byte more", []string{long + "y\n"}, []entry{{"stdout", "P", long}, {"stdout", "F", "y"}}},
		{"two long pieces", []string{long + long + "\n"}, []entry{{"stdout", "P", long}, {"stdout", "F", long}}},
		{"carriage return stays", []string{"a\r\n"}, []entry{{"stdout", "F", "a\r"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "0.log")
			w, err := Open(path)
			if err != nil {
				t.Fatal(err)
			}
			s := w.Stream("stdout")
			for _, p := range tt.writes {
				if n, err := s.Write([]byte(p)); n != len(p) || err != nil {
					t.Fatalf("Write = %d, %v", n, err)
				}
			}
			s.Flush()
			w.Close()
			b, _ := os.ReadFile(path)
			if got := parse(t, b); fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("got %.200q, want %.200q", got, tt.want)
			}
		})
	}
}

func TestStreamsInterleaveWholeLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	w, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	const lines = 5000
	var wg sync.WaitGroup
	for _, name := range []string{"stdout", "stderr"} {
		wg.Go(func() {
			s := w.Stream(name)
			for i := range lines {
				fmt.Fprintf(s, "%s %d\n", name, i)
			}
		})
	}
	wg.Wait()
	w.Close()
	b, _ := os.ReadFile(path)
	next := map[string]int{}
	for _, e := range parse(t, b) {
		if want := fmt.Sprintf("%s %d", e.stream, next[e.stream]); e.content != want {
			t.Fatalf("got %q, want %q", e.content, want)
		}
		next[e.stream]++
	}
	if next["stdout"] != lines || next["stderr"] != lines || w.Dropped() != 0 {
		t.Fatalf("lines %v, dropped %d", next, w.Dropped())
	}
}

func TestReopenLosesNoLine(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "0.log")
	w, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stream("stdout")
	var all []byte
	for i := range 20 {
		fmt.Fprintf(s, "line %d\n", i)
		old := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		if err := w.Reopen(); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(s, "after %d\n", i)
	}
	w.Close()
	for i := range 20 {
		b, _ := os.ReadFile(fmt.Sprintf("%s.%d", path, i))
		all = append(all, b...)
	}
	b, _ := os.ReadFile(path)
	if got := parse(t, append(all, b...)); len(got) != 40 {
		t.Fatalf("%d lines, want 40", len(got))
	}
	if got := parse(t, b); len(got) == 0 || got[len(got)-1].content != "after 19" {
		t.Fatalf("last file holds %v", got)
	}
	if err := w.Reopen(); err == nil {
		t.Fatal("Reopen of a closed log succeeded")
	}
}

// A file system that hangs in open(2) does not hang whoever rotates logs.
func TestReopenIsBounded(t *testing.T) {
	hang := make(chan struct{})
	opened := false
	w, err := newWriter(filepath.Join(t.TempDir(), "0.log"), func(path string) (file, error) {
		if opened {
			<-hang
		}
		opened = true
		return openFile(path)
	}, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Reopen(); !errdefs.IsUnavailable(err) {
		t.Errorf("Reopen: %v, want unavailable", err)
	}
	close(hang)
	w.Close()
}

func TestOpenRefusesWhatIsNoPlainFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{fifo, link, dir, filepath.Join(dir, "no", "such")} {
		if w, err := Open(p); err == nil {
			w.Close()
			t.Errorf("Open(%s) succeeded", p)
		}
	}
}

// disk is a file that can be full, or slow.
type disk struct {
	mu   sync.Mutex
	b    bytes.Buffer
	room int
	hang chan struct{}
}

func (d *disk) Write(p []byte) (int, error) {
	d.mu.Lock()
	hang := d.hang
	d.mu.Unlock()
	if hang != nil {
		<-hang
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(len(p), d.room)
	d.b.Write(p[:n])
	d.room -= n
	if n < len(p) {
		return n, syscall.ENOSPC
	}
	return n, nil
}
func (d *disk) Close() error { return nil }
func (d *disk) grow(n int) {
	d.mu.Lock()
	d.room += n
	d.mu.Unlock()
}

// T18: a full disk never stalls the container; whole lines are dropped and
// counted, and one line says so when there is room again.
func TestFullDisk(t *testing.T) {
	d := &disk{room: 1000}
	w, err := newWriter("test", func(string) (file, error) { return d, nil }, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stream("stdout")
	const lines = 40000
	start := time.Now()
	for i := range lines {
		fmt.Fprintf(s, "line %d of more than a full disk and the whole buffer can take\n", i)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("the container stood still for %v", took)
	}
	dropped := w.Dropped()
	if dropped == 0 || dropped >= lines {
		t.Fatalf("dropped %d lines", dropped)
	}
	d.grow(100 << 20)
	deadline := time.Now().Add(10 * time.Second)
	for {
		d.mu.Lock()
		said := bytes.Contains(d.b.Bytes(), []byte("dropped here"))
		d.mu.Unlock()
		if said {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no marker line 10 s after there was room")
		}
		time.Sleep(20 * time.Millisecond)
	}
	fmt.Fprintln(s, "again")
	w.Close()
	es := parse(t, d.b.Bytes())
	if got := len(es); got != lines-int(dropped)+2 {
		t.Errorf("%d lines in the log, want %d kept, a marker and one more", got, lines-int(dropped))
	}
	markers := 0
	for _, e := range es {
		if strings.Contains(e.content, fmt.Sprintf("%d log lines were dropped", dropped)) {
			markers++
		}
	}
	if markers != 1 || es[len(es)-1].content != "again" {
		t.Errorf("%d markers, last line %q", markers, es[len(es)-1].content)
	}
}

// T18, the disk that never answers.
func TestHangingDisk(t *testing.T) {
	d := &disk{room: 1 << 30, hang: make(chan struct{})}
	w, err := newWriter("test", func(string) (file, error) { return d, nil }, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stream("stdout")
	start := time.Now()
	for range 3 * maxQueue / 1000 {
		fmt.Fprintf(s, "%s\n", strings.Repeat("z", 1000))
	}
	if took := time.Since(start); took > stallAfter+2*time.Second {
		t.Errorf("the container stood still for %v", took)
	}
	if w.Dropped() == 0 {
		t.Error("nothing was dropped")
	}
	closed := make(chan struct{})
	go func() { w.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close hangs with the disk")
	}
	close(d.hang)
	<-w.done
}

func TestCloseWithFullDiskIsBounded(t *testing.T) {
	d := &disk{room: 10}
	w, err := newWriter("test", func(string) (file, error) { return d, nil }, time.Now)
	if err != nil {
		t.Fatal(err)
	}
	s := w.Stream("stdout")
	fmt.Fprintln(s, "hello")
	start := time.Now()
	w.Close()
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("Close took %v", took)
	}
	if w.Dropped() != 1 {
		t.Errorf("dropped = %d", w.Dropped())
	}
}

func FuzzLines(f *testing.F) {
	f.Add([]byte("a\nb"), uint16(1))
	f.Add([]byte("\n\n\r\n\x00"), uint16(3))
	f.Add(bytes.Repeat([]byte("x"), MaxLine+1), uint16(7))
	f.Fuzz(func(t *testing.T, in []byte, chunk uint16) {
		if len(in) > 256<<10 {
			return
		}
		d := &disk{room: 1 << 30}
		w, err := newWriter("fuzz", func(string) (file, error) { return d, nil }, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		s := w.Stream("stdout")
		for rest := in; len(rest) > 0; {
			n := min(len(rest), int(chunk)+1)
			s.Write(rest[:n])
			rest = rest[n:]
		}
		s.Flush()
		w.Close()
		var out []byte
		for _, e := range parse(t, d.b.Bytes()) {
			if len(e.content) > MaxLine {
				t.Fatalf("line of %d bytes", len(e.content))
			}
			out = append(out, e.content...)
			if e.tag == "F" {
				out = append(out, '\n')
			}
		}
		if !bytes.Equal(out, in) {
			t.Fatalf("read back %.200q, wrote %.200q", out, in)
		}
	})
}
