package cri

import (
	"fmt"
	"math"
	"slices"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	guestapi "github.com/cri-vz/cri-vz/guest/api"
)

// checkUserNamespace checks what a sandbox or a container says of its user
// namespace (T33).
func checkUserNamespace(at string, ns *runtimeapi.NamespaceOption) error {
	u := ns.GetUsernsOptions()
	at += ".namespace_options.userns_options"
	switch u.GetMode() {
	case runtimeapi.NamespaceMode_NODE:
		if len(u.GetUids()) > 0 || len(u.GetGids()) > 0 {
			return refuse(at, "mode NODE has no mappings")
		}
		return nil
	case runtimeapi.NamespaceMode_POD:
		if u == nil {
			return nil
		}
	default:
		return refuse(at+".mode", fmt.Sprintf("%v: the CRI has POD and NODE", u.GetMode()))
	}
	if ns.GetPid() == runtimeapi.NamespaceMode_NODE {
		return refuse(at, "the guest's first pid namespace (pid NODE) does not belong to the pod's user namespace")
	}
	for field, ids := range map[string][]*runtimeapi.IDMapping{"uids": u.GetUids(), "gids": u.GetGids()} {
		if len(ids) != 1 {
			return refuse(at+"."+field, fmt.Sprintf("there are %d mappings, one is supported", len(ids)))
		}
		switch m := ids[0]; {
		case m.GetContainerId() != 0:
			return refuse(at+"."+field+".container_id", fmt.Sprintf("the container's id 0 must be mapped, the mapping begins with %d", m.GetContainerId()))
		// Kubelets take any part of the range; its last id is the kernel's "none".
		case m.GetLength() == 0 || uint64(m.GetHostId())+uint64(m.GetLength()) > math.MaxUint32:
			return refuse(at+"."+field+".length", fmt.Sprintf("%d ids from %d on are no range of ids", m.GetLength(), m.GetHostId()))
		}
	}
	return nil
}

// userNamespaceOf is the pod's user namespace, nil if it has none.
func userNamespaceOf(pod *runtimeapi.PodSandboxConfig) *runtimeapi.UserNamespace {
	u := pod.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if u.GetMode() != runtimeapi.NamespaceMode_POD {
		return nil
	}
	return u
}

// mappedIDs is how many user and group ids a pod's processes can have, from 0 on.
func mappedIDs(pod *runtimeapi.PodSandboxConfig) (uids, gids int64) {
	u := userNamespaceOf(pod)
	if u == nil {
		return 1 << 31, 1 << 31
	}
	return int64(u.GetUids()[0].GetLength()), int64(u.GetGids()[0].GetLength())
}

// checkSameUserNamespace refuses a container whose user namespace is not its
// pod's: the pod's namespaces belong to that.
func checkSameUserNamespace(pod *runtimeapi.PodSandboxConfig, ns *runtimeapi.NamespaceOption) error {
	u := ns.GetUsernsOptions()
	if u == nil {
		return nil
	}
	if u.GetMode() == runtimeapi.NamespaceMode_NODE {
		u = nil
	}
	if !proto.Equal(u, userNamespaceOf(pod)) {
		return refuse("config.linux.security_context.namespace_options.userns_options", "must be the sandbox's")
	}
	return nil
}

// mountIDs are the ids that a mount's files have in the pod. They are mapped on
// the host, and as in the pod's user namespace or not at all.
func mountIDs(at string, pod *runtimeapi.PodSandboxConfig, m *runtimeapi.Mount) (uids, gids []*guestapi.IDMapping, err error) {
	if len(m.GetUidMappings()) == 0 && len(m.GetGidMappings()) == 0 {
		return nil, nil, nil
	}
	u := userNamespaceOf(pod)
	same := func(a, b *runtimeapi.IDMapping) bool { return proto.Equal(a, b) }
	for _, kind := range []struct {
		field     string
		want, got []*runtimeapi.IDMapping
		to        *[]*guestapi.IDMapping
	}{{"uidMappings", u.GetUids(), m.GetUidMappings(), &uids}, {"gidMappings", u.GetGids(), m.GetGidMappings(), &gids}} {
		if u == nil || !slices.EqualFunc(kind.want, kind.got, same) {
			return nil, nil, refuse(at+"."+kind.field, "must be those of the pod's user namespace")
		}
		for _, i := range kind.got {
			*kind.to = append(*kind.to, &guestapi.IDMapping{ContainerId: i.GetContainerId(), HostId: i.GetHostId(), Length: i.GetLength()})
		}
	}
	return uids, gids, nil
}
