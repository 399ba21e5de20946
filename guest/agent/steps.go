//go:build linux && (amd64 || arm64)

package agent

import (
	"fmt"
	"time"
)

// stepper runs named steps, times each, and stops at the first error.
type stepper struct {
	steps []namedStep
	err   error
}

func (s *stepper) run(name string, f func() error) {
	if s.err != nil {
		return
	}
	start := time.Now()
	if err := f(); err != nil {
		s.err = fmt.Errorf("%s: %w", name, err)
	}
	s.steps = append(s.steps, namedStep{name, int64(time.Since(start))})
}
