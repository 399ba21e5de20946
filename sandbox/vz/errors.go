//go:build (darwin && cgo) || fakevz

package vz

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/Code-Hex/vz/v3"
	"github.com/containerd/errdefs"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Domains of NSError.
const (
	domainVZ    = "VZErrorDomain"
	domainPOSIX = "NSPOSIXErrorDomain"
)

// macOS's numbers of errors, which are not those of the machine that the stand-in
// runs on.
var posixErrors = map[int]error{
	2: syscall.ENOENT, 12: syscall.ENOMEM, 13: syscall.EACCES, 23: syscall.ENFILE, 24: syscall.EMFILE, 28: syscall.ENOSPC,
	54: syscall.ECONNRESET, 60: syscall.ETIMEDOUT, 61: syscall.ECONNREFUSED,
}

// classify adds to an error of the framework what kind it is, and what to do.
func classify(err error) error {
	var ns *vz.NSError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, vz.ErrUnsupportedOSVersion):
		return fmt.Errorf("%w: macOS %g or later is needed: %w", err, firstMacOS, errdefs.ErrFailedPrecondition)
	case errors.Is(err, vz.ErrBuildTargetOSVersion):
		return fmt.Errorf("%w: build cri-vz with the SDK of a later macOS: %w", err, errdefs.ErrFailedPrecondition)
	// The pointer can be nil in an error that is not.
	case !errors.As(err, &ns) || ns == nil:
		return err
	case ns.Domain == domainPOSIX && posixErrors[ns.Code] != nil:
		return fmt.Errorf("%w: %w", err, posixErrors[ns.Code])
	case ns.Domain != domainVZ:
		return err
	}
	switch vz.ErrorCode(ns.Code) {
	case vz.ErrorVirtualMachineLimitExceeded:
		return fmt.Errorf("%w: this Mac runs as many virtual machines as it can: stop others, and restart the Mac if there are none: %w", err, errdefs.ErrResourceExhausted)
	case vz.ErrorOutOfDiskSpace:
		return fmt.Errorf("%w: free some space: %w: %w", err, syscall.ENOSPC, errdefs.ErrResourceExhausted)
	case vz.ErrorInvalidVirtualMachineConfiguration:
		return fmt.Errorf("%w: if it is about the entitlement com.apple.security.virtualization, sign cri-vz as `make build` does: %w: %w", err, vmm.ErrConfig, errdefs.ErrInvalidArgument)
	case vz.ErrorInvalidDiskImage:
		return fmt.Errorf("%w: a disk has to be a raw image: %w: %w", err, vmm.ErrConfig, errdefs.ErrInvalidArgument)
	case vz.ErrorInvalidVirtualMachineState, vz.ErrorInvalidVirtualMachineStateTransition:
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	case vz.ErrorNotSupported:
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotImplemented)
	case vz.ErrorNetworkError:
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}
