//go:build linux && (amd64 || arm64)

package container

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const testPasswd = `# comment:x:1:1
root:x:0:0:root:/root:/bin/sh
garbage:x:abc:0::/:/bin/sh
negative:x:-1:0::/:/bin/sh
huge:x:4294967295:0::/:/bin/sh
short:x:5
1234:x:77:77::/digits:/bin/sh
default-user:x:1000:1000::/home/default-user:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
relative:x:60:60::home:/bin/sh
crlf:x:61:61::/crlf:/bin/sh` + "\r\nlast:x:62:62::/last"

const testGroup = `root:x:0:root
www-data:x:33:
group-defined-in-image:x:50000:default-user,other
bad:x:x:default-user
second:x:50001:other,default-user
none:x:50002`

func TestResolveUser(t *testing.T) {
	id := func(v uint32) *uint32 { return &v }
	for _, test := range []struct {
		user User
		want Identity
		err  string
	}{
		{User{}, Identity{0, 0, []uint32{0}, "/root"}, ""},
		{User{Name: "1002"}, Identity{1002, 0, []uint32{0}, "/"}, ""},
		{User{Name: "1234"}, Identity{1234, 0, []uint32{0}, "/"}, ""}, // digits are never a name
		{User{Name: "www-data"}, Identity{33, 33, []uint32{33}, "/var/www"}, ""},
		{User{Name: "1003:1004"}, Identity{1003, 1004, []uint32{1004}, "/"}, ""},
		{User{Name: "www-data:1004"}, Identity{33, 1004, []uint32{1004}, "/var/www"}, ""},
		{User{Name: "7:www-data"}, Identity{7, 33, []uint32{33}, "/"}, ""},
		{User{Name: "www-data:"}, Identity{33, 33, []uint32{33}, "/var/www"}, ""},
		{User{Name: ":33"}, Identity{0, 33, []uint32{33, 0}, "/root"}, ""},
		// critest SupplementalGroupsPolicy
		{User{Name: "1000", AdditionalGIDs: []uint32{1234}, SupplementalGroupsPolicy: "Merge"}, Identity{1000, 1000, []uint32{1000, 50000, 50001, 1234}, "/home/default-user"}, ""},
		{User{Name: "1000", AdditionalGIDs: []uint32{1234, 1000}, SupplementalGroupsPolicy: "Strict"}, Identity{1000, 1000, []uint32{1000, 1234}, "/home/default-user"}, ""},
		// The CRI's run_as_user replaces the image's user and its group.
		{User{Name: "www-data:1004", UID: id(1000)}, Identity{1000, 1000, []uint32{1000, 50000, 50001}, "/home/default-user"}, ""},
		{User{Name: "www-data", GID: id(9)}, Identity{33, 9, []uint32{9}, "/var/www"}, ""},
		{User{Name: "relative"}, Identity{60, 60, []uint32{60}, "/"}, ""},
		{User{Name: "crlf"}, Identity{61, 61, []uint32{61}, "/crlf"}, ""},
		{User{Name: "last"}, Identity{62, 62, []uint32{62}, "/last"}, ""},
		// A line that does not parse is no account, least of all root's.
		{User{Name: "garbage"}, Identity{}, "unable to find user garbage"},
		{User{Name: "negative"}, Identity{}, "unable to find user"},
		{User{Name: "huge"}, Identity{}, "unable to find user"},
		{User{Name: "short"}, Identity{}, "unable to find user"},
		{User{Name: "-1"}, Identity{}, "unable to find user -1"},
		{User{Name: "0:nogroup"}, Identity{}, "unable to find group nogroup"},
		{User{Name: "4294967295"}, Identity{}, "above"},
		{User{Name: "99999999999999999999"}, Identity{}, "above"},
		{User{UID: id(4294967295)}, Identity{}, "above"},
		{User{GID: id(4294967295)}, Identity{}, "above"}, // setresgid(-1) changes nothing
		{User{SupplementalGroupsPolicy: "Both"}, Identity{}, "policy"},
	} {
		got, err := resolveUser([]byte(testPasswd), []byte(testGroup), test.user)
		switch {
		case test.err != "":
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%+v: error is %v, want %q", test.user, err, test.err)
			}
		case err != nil || !reflect.DeepEqual(got, test.want):
			t.Errorf("%+v: %+v, %v; want %+v", test.user, got, err, test.want)
		}
	}
}

// TestResolveUserFiles: what an image can put in the place of its passwd file.
func TestResolveUserFiles(t *testing.T) {
	for _, test := range []struct {
		name string
		make func(t *testing.T, root string)
		want string // error of looking a name up; empty: found
	}{
		{"regular", func(t *testing.T, root string) { writeTestFile(t, root+"/etc/passwd", "u:x:9:9::/:\n") }, ""},
		{"link inside", func(t *testing.T, root string) {
			writeTestFile(t, root+"/usr/passwd", "u:x:9:9::/:\n")
			symlink(t, "/usr/passwd", root+"/etc/passwd")
		}, ""},
		{"link to the outside", func(t *testing.T, root string) {
			writeTestFile(t, filepath.Dir(root)+"/passwd", "u:x:9:9::/:\n")
			symlink(t, "../../../passwd", root+"/etc/passwd")
		}, "unable to find user u"},
		{"missing", func(*testing.T, string) {}, "unable to find user u"},
		{"FIFO", func(t *testing.T, root string) { mknod(t, root+"/etc/passwd", unix.S_IFIFO|0o644, 0) }, "not a regular file"},
		{"device", func(t *testing.T, root string) {
			mknod(t, root+"/etc/passwd", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5)))
		}, "not a regular file"},
		{"directory", func(t *testing.T, root string) { _ = os.Mkdir(root+"/etc/passwd", 0o755) }, "not a regular file"},
		{"loop", func(t *testing.T, root string) { symlink(t, "passwd", root+"/etc/passwd") }, "symbolic links"},
		{"too large", func(t *testing.T, root string) {
			writeTestFile(t, root+"/etc/passwd", "u:x:9:9::/:\n")
			if err := os.Truncate(root+"/etc/passwd", 1<<40); err != nil {
				t.Fatal(err)
			}
		}, "larger than"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := filepath.Join(t.TempDir(), "root")
			if err := os.MkdirAll(root+"/etc", 0o755); err != nil {
				t.Fatal(err)
			}
			test.make(t, root)
			id, err := ResolveUser(root, User{Name: "u"})
			if test.want == "" && (err != nil || id.UID != 9) || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%+v, %v; want error %q", id, err, test.want)
			}
			if id, err := ResolveUser(root, User{Name: "1:2"}); err != nil || id.UID != 1 || id.GID != 2 {
				t.Errorf("numeric user: %+v, %v", id, err)
			}
		})
	}
}

func symlink(t *testing.T, target, name string) {
	t.Helper()
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

func mknod(t *testing.T, name string, mode uint32, dev int) {
	t.Helper()
	if err := unix.Mknod(name, mode, dev); err != nil {
		t.Fatalf("mknod %s (run as root): %v", name, err)
	}
}

func FuzzResolveUser(f *testing.F) {
	f.Add([]byte(testPasswd), []byte(testGroup), "default-user:second")
	f.Add([]byte("a:::\n:::::\nb:x:1:2"), []byte("::\n"), "b")
	f.Fuzz(func(t *testing.T, passwd, group []byte, name string) {
		id, err := resolveUser(passwd, group, User{Name: name})
		if err != nil {
			return
		}
		if id.UID > maxID || id.GID > maxID || !strings.HasPrefix(id.Home, "/") || len(id.Groups) == 0 || id.Groups[0] != id.GID {
			t.Errorf("%q: %+v", name, id)
		}
	})
}
