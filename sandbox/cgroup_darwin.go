package sandbox

import "context"

// macOS has no cgroups; a pod's processes are its shim and nothing else.
func makeCgroups(root, parent, id string) ([]string, error)  { return nil, nil }
func removeCgroups(ctx context.Context, dirs []string) error { return nil }
func cgroupNames(root, parent, id string) (string, error)    { return "", nil }
