package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"
)

// maxFailedStarts is how many consoles of failed starts are kept; the oldest
// goes first. Each is capped by the shim that wrote it.
const maxFailedStarts = 16

// failedStarts keeps the consoles of pods that did not start, since a failed
// start leaves nothing else behind: one file each, "<pod id>_<pod name>".
func (p *Pods) failedStarts() string { return filepath.Join(p.o.Root, "failed-starts") }

// keepConsole saves what the guest of a pod that is about to be removed wrote to
// its console. It is for people: an error of it is logged and costs nothing else.
// It reports whether there is something to look at.
func (p *Pods) keepConsole(pod *Pod) bool {
	err := func() error {
		if fi, err := os.Stat(pod.ConsolePath()); err != nil || fi.Size() == 0 {
			return fs.ErrNotExist
		}
		if err := os.MkdirAll(p.failedStarts(), 0o700); err != nil {
			return err
		}
		return os.Rename(pod.ConsolePath(), filepath.Join(p.failedStarts(), pod.id+"_"+fileName(pod.rec.config.GetMetadata().GetName())))
	}()
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err == nil {
		err = p.pruneFailedStarts()
	}
	if err != nil {
		klog.ErrorS(err, "Keep the console of a failed start", "pod", pod.id)
	}
	return err == nil
}

func (p *Pods) pruneFailedStarts() error {
	kept, err := p.listFailedStarts()
	if err != nil {
		return err
	}
	for _, path := range kept[min(len(kept), maxFailedStarts):] {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// listFailedStarts returns the files, the newest first.
func (p *Pods) listFailedStarts() ([]string, error) {
	entries, err := os.ReadDir(p.failedStarts())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	type file struct {
		path string
		at   int64
	}
	var files []file
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			files = append(files, file{filepath.Join(p.failedStarts(), e.Name()), fi.ModTime().UnixNano()})
		}
	}
	slices.SortFunc(files, func(a, b file) int { return int(min(max(b.at-a.at, -1), 1)) })
	paths := make([]string, len(files))
	for i, f := range files {
		paths[i] = f.path
	}
	return paths, nil
}

// FailedConsole finds the console of the newest failed start of a pod, by the
// beginning of its id (at least 6 characters) or its name. The error is
// errdefs.ErrNotFound if there is none; the last 16 are kept.
func (p *Pods) FailedConsole(idOrName string) (string, error) {
	paths, err := p.listFailedStarts()
	if err != nil {
		return "", fmt.Errorf("consoles of failed starts: %w", err)
	}
	for _, path := range paths {
		id, name, _ := strings.Cut(filepath.Base(path), "_")
		if name == fileName(idOrName) || len(idOrName) >= 6 && strings.HasPrefix(id, idOrName) {
			return path, nil
		}
	}
	return "", fmt.Errorf("no failed start of a pod %q is kept: %w", idOrName, errdefs.ErrNotFound)
}

// fileName makes a file name of a pod's name, which a client chose.
func fileName(name string) string {
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' {
			return r
		}
		return '-'
	}, name)
	return name[:min(len(name), 100)]
}
