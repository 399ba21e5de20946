//go:build linux && (amd64 || arm64)

package agent

import (
	"path"
	"reflect"
	"strings"
	"testing"
)

func TestParseModules(t *testing.T) {
	for _, c := range []struct {
		name, text string
		names      bool
		want       [][]string
		fails      bool
	}{
		{name: "empty"},
		{name: "list", text: "/modules/a.ko\n# x\n\n/modules/b.ko # y\n", want: [][]string{{"/modules/a.ko"}, {"/modules/b.ko"}}},
		{name: "on demand", text: "net-pf-16-proto-12 /modules/x.ko.xz /modules/y.ko\n", names: true, want: [][]string{{"net-pf-16-proto-12", "/modules/x.ko.xz", "/modules/y.ko"}}},
		{name: "name with dots", text: "../x /m.ko", names: true, want: [][]string{{"../x", "/m.ko"}}},
		{name: "outside", text: "../etc/x.ko", fails: true},
		{name: "inner dots", text: "/modules/../x.ko", fails: true},
		{name: "long line", text: strings.Repeat("x", 1<<17), fails: true},
		{name: "many lines", text: strings.Repeat("a\n", maxModules+1), fails: true},
	} {
		got, err := parseModules(strings.NewReader(c.text), c.names)
		if (err != nil) != c.fails || !c.fails && !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %q, %v", c.name, got, err)
		}
	}
}

func FuzzParseModules(f *testing.F) {
	f.Add("/modules/a.ko\n", false)
	f.Add("alias /modules/a.ko /b", true)
	f.Fuzz(func(t *testing.T, text string, names bool) {
		lines, err := parseModules(strings.NewReader(text), names)
		if err != nil {
			return
		}
		for _, l := range lines {
			for i, p := range l {
				if !(names && i == 0) && "/"+strings.TrimPrefix(p, "/") != path.Clean("/"+p) {
					t.Errorf("accepted path %q", p)
				}
			}
		}
	})
}
