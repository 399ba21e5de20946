package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
	guestapi "github.com/cri-vz/cri-vz/guest/api"
	"github.com/cri-vz/cri-vz/imageservice"
	"github.com/cri-vz/cri-vz/sandbox"
)

// LoadImage reads an image archive from the client; see node.proto.
func (s *Server) LoadImage(stream nodeapi.Node_LoadImageServer) error {
	archive, err := s.spool(stream)
	if err != nil {
		return err
	}
	defer archive.Close()
	images, err := s.Images.Load(stream.Context(), archive, func(p imageservice.Progress) {
		// A client that is gone ends the context, which ends the load.
		_ = stream.Send(&nodeapi.LoadImageResponse{What: p.Stage, DoneBytes: p.Bytes, TotalBytes: p.Total})
	})
	if err != nil {
		return err
	}
	for _, img := range images {
		err := stream.Send(&nodeapi.LoadImageResponse{Image: &nodeapi.LoadedImage{Id: img.ID, RepoTags: img.RepoTags, SizeBytes: img.Size}})
		if err != nil {
			return err
		}
	}
	return nil
}

// spool writes what the client sends to a file without a name, so that nothing
// is left of it whatever happens: an archive's index may come last, so reading
// it takes seeking.
func (s *Server) spool(stream nodeapi.Node_LoadImageServer) (*os.File, error) {
	f, err := os.CreateTemp(s.Spool, "load-")
	if err != nil {
		return nil, fmt.Errorf("spool the image archive: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("spool the image archive: %w", err)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			_, err = f.Seek(0, io.SeekStart)
			return f, err
		}
		if err == nil {
			_, err = f.Write(m.GetData())
		}
		if err != nil {
			f.Close()
			if errors.Is(err, syscall.ENOSPC) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
			}
			return nil, fmt.Errorf("spool the image archive in %s: %w", s.Spool, err)
		}
	}
}

// Pull is PullImage with progress; see node.proto.
func (s *Server) Pull(req *nodeapi.PullRequest, stream nodeapi.Node_PullServer) error {
	if req.GetImage() == "" {
		return refuse("image", "is empty")
	}
	img, err := s.Images.Pull(stream.Context(), req.GetImage(), nil, func(p imageservice.Progress) {
		what := p.Stage
		if p.LayersTotal > 0 {
			what = fmt.Sprintf("%s, %d of %d layers ready", what, p.Layers, p.LayersTotal)
		}
		// A client that is gone ends the context, which ends the pull.
		_ = stream.Send(&nodeapi.PullResponse{What: what, DoneBytes: p.Bytes, TotalBytes: p.Total})
	})
	if err != nil {
		return err
	}
	return stream.Send(&nodeapi.PullResponse{ImageId: img.ID})
}

// WatchSteps follows a pod's start; see node.proto.
func (s *Server) WatchSteps(req *nodeapi.WatchStepsRequest, stream nodeapi.Node_WatchStepsServer) error {
	steps, err := s.Pods.WatchSteps(stream.Context(), &runtimeapi.PodSandboxMetadata{
		Name: req.GetName(), Namespace: req.GetNamespace(), Uid: req.GetUid(), Attempt: req.GetAttempt(),
	})
	if err != nil {
		return err
	}
	for step := range steps {
		if err := stream.Send(&nodeapi.Step{Name: step.Name, Nanos: step.Nanos, Error: step.Error, Last: step.Last}); err != nil {
			return err
		}
	}
	return stream.Context().Err()
}

// Console sends a pod's console log; see node.proto.
func (s *Server) Console(req *nodeapi.ConsoleRequest, stream nodeapi.Node_ConsoleServer) error {
	path, err := s.consolePath(req.GetPodSandboxId())
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("console of pod %s: %w", req.GetPodSandboxId(), err)
	}
	defer f.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if err := stream.Send(&nodeapi.ConsoleResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return fmt.Errorf("console of pod %s: %w", req.GetPodSandboxId(), err)
		}
	}
}

// consolePath finds the console of a pod, or of one that failed to start.
func (s *Server) consolePath(ref string) (string, error) {
	pod, err := s.findPod(ref)
	if err == nil {
		return pod.ConsolePath(), nil
	}
	if errdefs.IsNotFound(err) {
		if path, ferr := s.Pods.FailedConsole(ref); !errdefs.IsNotFound(ferr) {
			return path, ferr
		}
	}
	return "", err
}

// findPod takes what a person types: an id, the beginning of one, or the name of
// exactly one pod.
func (s *Server) findPod(ref string) (*sandbox.Pod, error) {
	pod, err := s.Pods.Get(ref)
	if !errdefs.IsNotFound(err) {
		return pod, err
	}
	var found []*sandbox.Pod
	var ids []string
	for _, p := range s.Pods.List() {
		if p.Config().GetMetadata().GetName() == ref {
			found, ids = append(found, p), append(ids, p.ID()[:12])
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no pod sandbox has the id or name %q: %w", ref, errdefs.ErrNotFound)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%d pod sandboxes are named %q (%s): give an id: %w", len(found), ref, strings.Join(ids, ", "), errdefs.ErrInvalidArgument)
}

// Forward carries one connection to a port of a pod; see node.proto.
func (s *Server) Forward(stream nodeapi.Node_ForwardServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	pod, err := s.findPod(first.GetPodSandboxId())
	if err != nil {
		return err
	}
	if first.GetPort() < 1 || first.GetPort() > 65535 {
		return refuse("port", fmt.Sprintf("%d is not in 1 to 65535", first.GetPort()))
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	st, err := pod.Stream(ctx, guestapi.Header{Kind: guestapi.Port, Port: uint16(first.GetPort())})
	if err != nil {
		return err
	}
	defer st.Close()
	context.AfterFunc(ctx, func() { st.Close() })
	if err := stream.Send(&nodeapi.ForwardResponse{Open: true}); err != nil {
		return err
	}
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				cancel() // the client is gone
				return
			}
			if _, err := st.Write(m.GetData()); err != nil {
				return // the reader below sees why
			}
			if m.GetEof() {
				_ = st.CloseWrite()
			}
		}
	}()
	buf := make([]byte, 16<<10)
	for {
		n, err := st.Read(buf)
		if n > 0 {
			if err := stream.Send(&nodeapi.ForwardResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return stream.Send(&nodeapi.ForwardResponse{Eof: true})
		case err != nil:
			return fmt.Errorf("forward port %d of pod %s: %w", first.GetPort(), pod.ID(), err)
		}
		if n > len(buf)/2 && len(buf) < streamBuffer { // there is more than it holds
			buf = make([]byte, streamBuffer)
		}
	}
}
