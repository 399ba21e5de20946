package shim

import (
	"strings"
	"testing"
)

func TestIsName(t *testing.T) {
	for name, want := range map[string]bool{
		"a": true, "Z9": true, "0.a_b-c": true, strings.Repeat("x", 128): true,
		"": false, ".": false, "..": false, "_a": false, "-a": false, "a/b": false, "a b": false, "a\x00": false, "ä": false,
		strings.Repeat("x", 129): false,
	} {
		if got := isName(name, 128); got != want {
			t.Errorf("isName(%q) = %v", name, got)
		}
	}
}
