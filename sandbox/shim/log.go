package shim

import (
	"flag"
	"os"
	"sync"

	"github.com/containerd/log"
	"k8s.io/klog/v2"
)

// maxLog bounds the shim's own log; the one before it is kept as well.
const maxLog = 1 << 20

// openLog sends klog to path and returns what flushes and closes it. Without a
// file it stays on standard error, which the daemon's launch gave to the same
// place.
func openLog(path string) (flush func()) {
	var fs flag.FlagSet
	klog.InitFlags(&fs)
	_ = fs.Set("logtostderr", "false")
	_ = fs.Set("alsologtostderr", "false")
	_ = fs.Set("stderrthreshold", "FATAL")
	w := &logFile{path: path}
	klog.SetOutput(w)
	// The ttrpc client writes a line to standard error for each message of the guest's
	// that it can't place: a guest could fill the host's disk. An agent that talks such
	// stuff is found out by its silence (T12).
	_ = log.SetLevel("fatal")
	return func() {
		klog.Flush()
		klog.SetOutput(os.Stderr)
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.f != nil {
			w.f.Close()
		}
	}
}

// logFile is a file that is moved aside when it is full. Errors are swallowed:
// there is nobody to tell.
type logFile struct {
	path string
	mu   sync.Mutex // one writer: this is the file's own lock
	f    *os.File
	size int64
}

func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f != nil && l.size+int64(len(p)) > maxLog {
		l.f.Close()
		l.f = nil
		_ = os.Rename(l.path, l.path+".1")
	}
	if l.f == nil {
		f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return len(p), nil
		}
		if st, err := f.Stat(); err == nil {
			l.size = st.Size()
		}
		l.f = f
	}
	n, _ := l.f.Write(p)
	l.size += int64(n)
	return len(p), nil
}
