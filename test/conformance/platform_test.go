//go:build linux && !fakevz

package conformance_test

func platform(string, string) (guests string, settings []string, err error) { return "", nil, nil }
