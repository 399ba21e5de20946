package main

import (
	"slices"
	"testing"
)

func TestNotTaken(t *testing.T) {
	fragment := "# a comment\nCONFIG_A=y\nCONFIG_B=y\nCONFIG_N=\"x\"\n# CONFIG_C is not set\n# CONFIG_D is not set\n"
	taken := "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_N=\"x\"\nCONFIG_C=y\n"
	if got, want := notTaken([]byte(fragment), []byte(taken)), []string{"CONFIG_B=y", "# CONFIG_C is not set"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
