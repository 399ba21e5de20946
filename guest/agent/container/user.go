//go:build linux && (amd64 || arm64)

package container

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Policies for groups that the image's group file gives a user (CRI
// SupplementalGroupsPolicy).
const (
	// GroupsMerge adds the image's group memberships. It is the default.
	GroupsMerge = "Merge"
	// GroupsStrict uses AdditionalGIDs only.
	GroupsStrict = "Strict"
)

// maxAccountFile caps the passwd and group files of an image, in bytes.
// Directories of whole organisations stay below it.
const maxAccountFile = 4 << 20

// maxID is the largest id accepted as text, as in containerd and runc.
const maxID = 1<<31 - 1

// User says as whom a process runs, in terms that only the guest can resolve
// because only it sees the image's files.
type User struct {
	// Name is the image config's User or the CRI's run_as_username:
	// "user", "uid", "user:group", "uid:gid" and mixtures. Digits are an id,
	// never a name. Empty is "0".
	Name string `json:"name,omitempty"`
	// UID replaces Name, its group included.
	UID *uint32 `json:"uid,omitempty"`
	// GID replaces the group that Name or the passwd file gives.
	GID *uint32 `json:"gid,omitempty"`
	// AdditionalGIDs are supplementary groups whatever the policy.
	AdditionalGIDs []uint32 `json:"additionalGids,omitempty"`
	// SupplementalGroupsPolicy is GroupsMerge, GroupsStrict or empty.
	SupplementalGroupsPolicy string `json:"supplementalGroupsPolicy,omitempty"`
}

// Identity is a resolved User.
type Identity struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	// Groups are the supplementary groups without duplicates, GID first, as
	// containerd has them.
	Groups []uint32 `json:"groups"`
	// Home is the passwd file's home directory, "/" if there is none.
	Home string `json:"home"`
}

// ResolveUser looks a user up in /etc/passwd and /etc/group of the tree at
// rootfs. Symbolic links are resolved inside rootfs; both files are hostile:
// anything but a regular file of at most 4 MiB is not read, and lines that
// don't parse are skipped. A file that is not there or not readable is an empty
// one, so a numeric user needs neither. It may be called concurrently.
func ResolveUser(rootfs string, user User) (Identity, error) {
	fd, err := unix.Open(rootfs, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Identity{}, fmt.Errorf("open root filesystem %s: %w", rootfs, err)
	}
	defer unix.Close(fd)
	return resolveUserIn(rootDir{fd}, user)
}

func resolveUserIn(root rootDir, user User) (Identity, error) {
	passwd, passwdErr := root.readFile("/etc/passwd", maxAccountFile)
	group, groupErr := root.readFile("/etc/group", maxAccountFile)
	id, err := resolveUser(passwd, group, user)
	if err != nil {
		// Why a name was not found. A numeric user gets along without the files,
		// for example when they are masked.
		for _, cause := range []error{passwdErr, groupErr} {
			if cause != nil && !errors.Is(cause, os.ErrNotExist) {
				return Identity{}, fmt.Errorf("%w (%w)", err, cause)
			}
		}
	}
	return id, err
}

// resolveUser is ResolveUser on the contents of the two files.
func resolveUser(passwd, group []byte, user User) (Identity, error) {
	name, groupName, hasGroup := strings.Cut(user.Name, ":")
	if user.UID != nil {
		name, hasGroup = strconv.FormatUint(uint64(*user.UID), 10), false
		if *user.UID > maxID {
			return Identity{}, fmt.Errorf("uid %d is above %d", *user.UID, maxID)
		}
	}
	if name == "" {
		name = "0"
	}
	id := Identity{Home: "/"}
	uid, isID, err := parseID(name)
	if err != nil {
		return Identity{}, fmt.Errorf("user %q: %w", user.Name, err)
	}
	id.UID = uid
	entry, found := findAccount(passwd, func(a account) bool {
		return isID && a.uid == uid || !isID && a.name == name
	})
	switch {
	case found:
		id.UID, id.GID, name = entry.uid, entry.gid, entry.name
		if strings.HasPrefix(entry.home, "/") {
			id.Home = entry.home
		}
	case !isID:
		return Identity{}, fmt.Errorf("unable to find user %s: no matching entries in passwd file", name)
	}

	switch {
	case user.GID != nil:
		id.GID = *user.GID
	case hasGroup && groupName != "":
		gid, isID, err := parseID(groupName)
		if err != nil {
			return Identity{}, fmt.Errorf("group of user %q: %w", user.Name, err)
		}
		if !isID {
			if gid, err = findGroup(group, groupName); err != nil {
				return Identity{}, err
			}
		}
		id.GID = gid
	}

	groups := []uint32{id.GID}
	switch user.SupplementalGroupsPolicy {
	case "", GroupsMerge:
		if found || !isID {
			groups = append(groups, memberships(group, name)...)
		}
	case GroupsStrict:
	default:
		return Identity{}, fmt.Errorf("unknown supplemental groups policy %q", user.SupplementalGroupsPolicy)
	}
	groups = append(groups, user.AdditionalGIDs...)
	seen := make(map[uint32]bool, len(groups))
	for _, gid := range groups {
		if gid > maxID {
			// setresgid takes the largest of these for "leave as it is".
			return Identity{}, fmt.Errorf("gid %d is above %d", gid, maxID)
		}
		if !seen[gid] {
			seen[gid] = true
			id.Groups = append(id.Groups, gid)
		}
	}
	return id, nil
}

// parseID reads a decimal id; isID is false for what isn't all digits.
func parseID(s string) (id uint32, isID bool, err error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > maxID {
		return 0, true, fmt.Errorf("id %s is above %d", s, maxID)
	}
	return uint32(n), true, nil
}

// account is one line of passwd(5).
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// findAccount returns the first account that match accepts. Lines without
// numeric ids are skipped: reading garbage as 0 would make root of it.
func findAccount(passwd []byte, match func(account) bool) (account, bool) {
	for line := range bytes.Lines(passwd) {
		f := strings.Split(strings.TrimRight(string(line), "\r\n"), ":")
		if len(f) < 4 || f[0] == "" || strings.HasPrefix(f[0], "#") {
			continue
		}
		uid, ok1, err1 := parseID(f[2])
		gid, ok2, err2 := parseID(f[3])
		if !ok1 || !ok2 || err1 != nil || err2 != nil {
			continue
		}
		a := account{name: f[0], uid: uid, gid: gid}
		if len(f) > 5 {
			a.home = f[5]
		}
		if match(a) {
			return a, true
		}
	}
	return account{}, false
}

// eachGroup calls yield for every well-formed line of group(5).
func eachGroup(group []byte, yield func(name string, gid uint32, members string) bool) {
	for line := range bytes.Lines(group) {
		f := strings.SplitN(strings.TrimRight(string(line), "\r\n"), ":", 4)
		if len(f) < 3 || f[0] == "" || strings.HasPrefix(f[0], "#") {
			continue
		}
		gid, ok, err := parseID(f[2])
		if !ok || err != nil {
			continue
		}
		members := ""
		if len(f) == 4 {
			members = f[3]
		}
		if !yield(f[0], gid, members) {
			return
		}
	}
}

func findGroup(group []byte, name string) (uint32, error) {
	var gid uint32
	found := false
	eachGroup(group, func(n string, g uint32, _ string) bool {
		if n == name {
			gid, found = g, true
		}
		return !found
	})
	if !found {
		return 0, fmt.Errorf("unable to find group %s: no matching entries in group file", name)
	}
	return gid, nil
}

// memberships lists the groups whose line names the user.
func memberships(group []byte, user string) []uint32 {
	var gids []uint32
	eachGroup(group, func(_ string, gid uint32, members string) bool {
		if slices.Contains(strings.Split(members, ","), user) {
			gids = append(gids, gid)
		}
		return true
	})
	return gids
}
