package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// The console's file keeps how the guest began, which is where boots fail, and
// what it said last, which is where guests die.
const (
	consoleHead = 256 << 10
	consoleMax  = 1 << 20
	consoleKeep = 384 << 10 // of the tail, whenever the file is full
	consoleCut  = "\n[cri-vz: a part of the console's output was left out here]\n"
	// consoleQuote is how much of the end an error message quotes.
	consoleQuote      = 2 << 10
	consoleQuoteLines = 12
)

// console copies what a guest writes from a pipe to a capped file, whatever the
// disk does: a guest must not stall because nobody takes its console.
type console struct {
	w     *os.File // the machine's end
	r     *os.File
	bytes atomic.Uint64
	wrote chan struct{} // holds a token after each output
	done  chan struct{}

	mu   sync.Mutex
	tail []byte
}

func openConsole(path string) (*console, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open console file: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("console: %w", err)
	}
	c := &console{r: r, w: w, wrote: make(chan struct{}, 1), done: make(chan struct{})}
	go c.copy(f)
	return c, nil
}

func (c *console) copy(f *os.File) {
	defer close(c.done)
	defer f.Close()
	buf := make([]byte, 16<<10)
	var size int64
	for {
		n, err := c.r.Read(buf)
		if n > 0 {
			c.bytes.Add(uint64(n))
			select {
			case c.wrote <- struct{}{}:
			default:
			}
			c.mu.Lock()
			c.tail = append(c.tail, buf[:n]...)
			if over := len(c.tail) - consoleQuote; over > 0 {
				c.tail = append(c.tail[:0], c.tail[over:]...)
			}
			c.mu.Unlock()
			// A full disk costs the console's file, nothing else.
			if size+int64(n) > consoleMax {
				size = cutConsole(f, size)
			}
			if m, err := f.WriteAt(buf[:n], size); err == nil {
				size += int64(m)
			}
		}
		if err != nil {
			return
		}
	}
}

// cutConsole drops the middle of a full console file and returns its new size.
func cutConsole(f *os.File, size int64) int64 {
	tail := make([]byte, consoleKeep)
	n, err := f.ReadAt(tail, size-consoleKeep)
	if err != nil && !errors.Is(err, io.EOF) {
		return consoleHead
	}
	b := append([]byte(consoleCut), tail[:n]...)
	if _, err := f.WriteAt(b, consoleHead); err != nil {
		return consoleHead
	}
	size = consoleHead + int64(len(b))
	_ = f.Truncate(size)
	return size
}

// lastLines is the end of the guest's output, escaped, for an error message.
func (c *console) lastLines() string {
	c.mu.Lock()
	b := bytes.Clone(c.tail)
	c.mu.Unlock()
	lines := strings.Split(strings.TrimRight(string(b), "\r\n\x00 "), "\n")
	if len(lines) > consoleQuoteLines {
		lines = lines[len(lines)-consoleQuoteLines:]
	}
	for i, l := range lines {
		lines[i] = escape(strings.TrimRight(l, "\r"), 512)
	}
	if len(lines) == 1 && lines[0] == "" {
		return "the guest wrote nothing to its console"
	}
	return "the console's last lines: " + strings.Join(lines, " | ")
}

// close ends the copying, after what a machine that is gone wrote was read.
func (c *console) close() {
	c.w.Close()
	select {
	case <-c.done:
	case <-time.After(time.Second):
		// Something still holds the other end.
	}
	c.r.Close()
	<-c.done
}

// escape makes foreign text fit for a message of one line, of at most n bytes.
func escape(s string, n int) string {
	cut := len(s) > n
	if cut {
		s = s[:n]
	}
	var b strings.Builder
	for _, r := range s {
		if r == '\uFFFD' || !strconv.IsPrint(r) {
			if r == '\n' {
				b.WriteString(" ")
				continue
			}
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
			continue
		}
		b.WriteRune(r)
	}
	if cut {
		b.WriteString("...")
	}
	return b.String()
}
