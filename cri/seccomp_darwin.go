package cri

import (
	"errors"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func defaultSeccomp(*specs.Spec) (*specs.LinuxSeccomp, error) {
	return nil, errors.New("RuntimeDefault is not available on macOS: the profile's library needs Linux; use Localhost or Unconfined")
}
