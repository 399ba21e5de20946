package shim

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"
)

// Duration is a time.Duration that is text ("10s") in JSON.
type Duration time.Duration

// MarshalJSON implements json.Marshaler.
func (d Duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(time.Duration(d).String())
}

// UnmarshalJSON implements json.Unmarshaler.
func (d *Duration) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.ParseDuration(s)
	*d = Duration(v)
	return err
}

func (t Timeouts) withDefaults() Timeouts {
	def := func(d *Duration, v time.Duration) {
		if *d <= 0 {
			*d = Duration(v)
		}
	}
	def(&t.BootStall, 10*time.Second)
	def(&t.Boot, 120*time.Second)
	def(&t.Agent, 10*time.Second)
	def(&t.Kill, 2*time.Second)
	def(&t.Idle, 60*time.Second)
	return t
}

// readCapped reads a file that should be no longer than limit bytes.
func readCapped(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return b, err
}
