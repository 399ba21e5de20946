package cri

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// slowCall is how long a call may take before its end is logged without -v.
const slowCall = 5 * time.Second

func unaryErrors(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	defer func(start time.Time) { err = finish(info.FullMethod, start, err, recover()) }(time.Now())
	return h(ctx, req)
}

func streamErrors(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	defer func(start time.Time) { err = finish(info.FullMethod, start, err, recover()) }(time.Now())
	return h(srv, ss)
}

// finish logs a call and gives its error a gRPC code: the only place that does.
// A panic ends its call and nothing else.
func finish(method string, start time.Time, err error, panicked any) error {
	if panicked != nil {
		klog.ErrorS(nil, "Panic in a call", "method", method, "panic", panicked, "stack", string(debug.Stack()))
		err = fmt.Errorf("%s: internal error, see the daemon's log: %w", method, errdefs.ErrInternal)
	}
	took := time.Since(start)
	switch {
	case err != nil:
		klog.InfoS("Call failed", "method", method, "took", took, "err", err)
	case took > slowCall:
		klog.InfoS("Slow call", "method", method, "took", took)
	default:
		klog.V(2).InfoS("Call", "method", method, "took", took)
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return errgrpc.ToGRPC(err)
}

// refuse is the error for a field that this runtime can't honour: it names the
// field and says why (T39).
func refuse(field, why string) error {
	return fmt.Errorf("%s: %s: %w", field, why, errdefs.ErrInvalidArgument)
}
