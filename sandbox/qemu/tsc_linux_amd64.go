package qemu

import (
	"math"
	"sync"
	"time"
)

// rdtsc reads the processor's time-stamp counter.
func rdtsc() uint64

// tscSample is what the counter was at a time.
type tscSample struct {
	at  time.Time
	tsc uint64
}

// readTSC keeps the reading of several that was disturbed least.
func readTSC() (s tscSample) {
	least := time.Duration(math.MaxInt64)
	for range 8 {
		before, tsc := time.Now(), rdtsc()
		if took := time.Since(before); took < least {
			least, s = took, tscSample{before.Add(took / 2), tsc}
		}
	}
	return s
}

// tscFirst is early, so that the first VM needn't wait for tscKHz.
var tscFirst = readTSC()

// tscKHz is how fast the host's time-stamp counter counts, in kHz; 0 is unknown. It may
// take 20 ms once, which makes it good for 1 part in 10,000.
var tscKHz = sync.OnceValue(func() uint64 {
	time.Sleep(20*time.Millisecond - time.Since(tscFirst.at))
	last := readTSC()
	khz := float64(last.tsc-tscFirst.tsc) / float64(last.at.Sub(tscFirst.at)) * 1e6
	if khz < 100e3 || khz > 100e6 {
		return 0 // it stood still or was set
	}
	return uint64(khz)
})
