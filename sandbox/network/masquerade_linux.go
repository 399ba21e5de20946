package network

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/klog/v2"
)

// masqueradeTimeout bounds the wait for the turn and the calls of iptables, which wait
// for others' (-w).
const masqueradeTimeout = 30 * time.Second

// masquerade sees to it that what the built-in network's pods send into the world has
// the node's address: one rule for each subnet. The bridge plugin's own way, ipMasq, is
// a chain for each pod, which takes half of the time of its ADD and DEL.
func (n *Network) masquerade(ctx context.Context, r *record) error {
	if len(r.Masquerade) == 0 {
		return nil
	}
	ctx, cancel := masqueradeContext(ctx)
	defer cancel()
	done, err := n.firewall(ctx)
	if err != nil {
		return err
	}
	defer done()
	for _, subnet := range r.Masquerade {
		err := n.iptables(ctx, "-C", subnet)
		if noSuchRule(err) {
			err = n.iptables(ctx, "-A", subnet)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unmasquerade removes the rules that only the pod of r needed.
func (n *Network) unmasquerade(ctx context.Context, r *record) error {
	if len(r.Masquerade) == 0 {
		return nil
	}
	ctx, cancel := masqueradeContext(ctx)
	defer cancel()
	// A pod's record is there before it asks for the rule: who comes while the turn is
	// taken is either seen here or adds the rule again.
	done, err := n.firewall(ctx)
	if err != nil {
		return err
	}
	defer done()
	ids, err := n.pods()
	if err != nil {
		return err
	}
	unused := slices.Clone(r.Masquerade)
	for _, id := range ids {
		if len(unused) == 0 {
			return nil
		}
		if id == r.Pod.ID {
			continue
		}
		other, err := readRecord(n.recordPath(id))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			// That pod may need them, and this one is not to blame.
			klog.ErrorS(err, "Masquerading rules are left", "pod", r.Pod.ID, "subnets", r.Masquerade)
			return nil
		}
		unused = slices.DeleteFunc(unused, func(p netip.Prefix) bool { return slices.Contains(other.Masquerade, p) })
	}
	for _, subnet := range unused {
		if err := n.iptables(ctx, "-D", subnet); err != nil && !noSuchRule(err) {
			return err
		}
	}
	return nil
}

// firewall waits for the turn to change the firewall, which ends with done.
func (n *Network) firewall(ctx context.Context) (done func(), err error) {
	select {
	case n.firewallTurn <- struct{}{}:
		return func() { <-n.firewallTurn }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("waited for other pods' firewall rules: %w", context.Cause(ctx))
	}
}

func masqueradeContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, masqueradeTimeout, fmt.Errorf("it took longer than %v", masqueradeTimeout))
}

// noSuchRule tells what iptables answers to -C and -D of a rule that somebody flushed.
func noSuchRule(err error) bool {
	var exit *exec.ExitError
	return errors.As(err, &exit) && exit.ExitCode() == 1
}

// iptables appends (-A), deletes (-D) or looks for (-C) the rule of a subnet.
func (n *Network) iptables(ctx context.Context, command string, subnet netip.Prefix) error {
	cmd := exec.CommandContext(ctx, iptablesOf(subnet), "-w", "-t", "nat", command, "POSTROUTING",
		"-s", subnet.String(), "!", "-o", builtinBridge, "-m", "comment", "--comment", "cri-vz: from pods into the world", "-j", "MASQUERADE")
	cmd.WaitDelay = time.Second
	var out cappedBuffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := inNetns(n.cfg.NodeNetns, cmd.Run)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("masquerade %s: %s: %w: %s", subnet, cmd, err, excerpt(out.buf.Bytes()))
	}
	return nil
}

func iptablesOf(subnet netip.Prefix) string {
	if subnet.Addr().Is6() {
		return "ip6tables"
	}
	return "iptables"
}
