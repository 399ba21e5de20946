package sandbox

// process is a process that may be another daemon's child: a pid alone could be
// somebody else's by now (T13).
type process struct {
	PID   int    `json:"pid,omitempty"`
	Start uint64 `json:"start,omitempty"` // clock ticks since boot
}
