//go:build linux && (amd64 || arm64)

package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// classes are the kinds of errors that the API tells apart, with the names
// they have between PID 1 and pod-init.
var classes = []struct {
	name string
	err  error
	code codes.Code
}{
	{"invalid", errdefs.ErrInvalidArgument, codes.InvalidArgument},
	{"not-found", errdefs.ErrNotFound, codes.NotFound},
	{"exists", errdefs.ErrAlreadyExists, codes.AlreadyExists},
	{"precondition", errdefs.ErrFailedPrecondition, codes.FailedPrecondition},
	{"unimplemented", errdefs.ErrNotImplemented, codes.Unimplemented},
	{"unavailable", errdefs.ErrUnavailable, codes.Unavailable},
	{"exhausted", errdefs.ErrResourceExhausted, codes.ResourceExhausted},
	{"permission", errdefs.ErrPermissionDenied, codes.PermissionDenied},
	{"deadline", context.DeadlineExceeded, codes.DeadlineExceeded},
	{"canceled", context.Canceled, codes.Canceled},
}

// classError is an error of a class whose text is its own only.
type classError struct {
	class error
	err   error
}

func (e *classError) Error() string   { return e.err.Error() }
func (e *classError) Unwrap() []error { return []error{e.err, e.class} }

func invalidf(format string, args ...any) error {
	return &classError{errdefs.ErrInvalidArgument, fmt.Errorf(format, args...)}
}

func notFoundf(format string, args ...any) error {
	return &classError{errdefs.ErrNotFound, fmt.Errorf(format, args...)}
}

func existsf(format string, args ...any) error {
	return &classError{errdefs.ErrAlreadyExists, fmt.Errorf(format, args...)}
}

func preconditionf(format string, args ...any) error {
	return &classError{errdefs.ErrFailedPrecondition, fmt.Errorf(format, args...)}
}

func unavailablef(format string, args ...any) error {
	return &classError{errdefs.ErrUnavailable, fmt.Errorf(format, args...)}
}

// classOf names err's class, "" for none.
func classOf(err error) string {
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.name
		}
	}
	return ""
}

// errorOf is the inverse of classOf for an error that came as text.
func errorOf(class, text string) error {
	for _, c := range classes {
		if c.name == class {
			return &classError{c.err, errors.New(text)}
		}
	}
	return errors.New(text)
}

// statusOf is how an error crosses the API.
func statusOf(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}
