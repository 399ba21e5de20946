package command

import "testing"

// What guests, images and other clients say can't drive a terminal.
func TestForeignTextIsEscaped(t *testing.T) {
	for _, tc := range []struct{ in, lines, console string }{
		{"plain ü\ttab", "plain ü·tab", `plain \xc3\xbc` + "\ttab"},
		{"a\nb", "a\nb", "a\nb"},
		{"\x1b[2J\x07\x7f", "·[2J··", "^[[2J^G^?"},
		{"\u009b2J", "·2J", `\xc2\x9b2J`}, // CSI in one character
		{"\x9b2J", "\ufffd2J", `\x9b2J`},
		{"\u202egpj.exe", "·gpj.exe", `\xe2\x80\xaegpj.exe`}, // right to left
	} {
		if got := printableLines(tc.in); got != tc.lines {
			t.Errorf("printableLines(%q) = %q", tc.in, got)
		}
		if got := string(escapeControl([]byte(tc.in))); got != tc.console {
			t.Errorf("escapeControl(%q) = %q", tc.in, got)
		}
	}
}
