package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stopTimeout bounds a pod's end as the command line sees it; the daemon's own
// bounds are much shorter.
const stopTimeout = time.Minute

func newStop(c *client) *cobra.Command {
	var grace int64
	cmd := &cobra.Command{
		Use:   "stop POD...",
		Short: "Stop pods and remove them (a pod's VM can't be started again)",
		Long: `Stop pods and remove them with their containers and the logs that "cri-vz run"
kept. POD is an id, the beginning of one, or a name; each is printed when it is gone.`,
		Args:    cobra.MinimumNArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, ref := range args {
				pod, err := c.findPod(cmd.Context(), ref)
				if err != nil {
					return err
				}
				shown := newProgress(cmd.ErrOrStderr()).follow("stopping " + printable(ref))
				err = c.removePod(cmd.Context(), cmd.Context(), pod, grace)
				shown()
				if err != nil {
					return fmt.Errorf("stop %s: %s", ref, message(err))
				}
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), printable(ref)); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().Int64VarP(&grace, "time", "t", 10, "seconds that containers get to end by themselves")
	return cmd
}

func (c *client) findPod(ctx context.Context, ref string) (*runtimeapi.PodSandbox, error) {
	if ref == "" { // which is the beginning of every id
		return nil, errors.New("the pod's id or name is empty; `cri-vz ps -a` lists them")
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	r, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	var found []*runtimeapi.PodSandbox
	for _, p := range r.GetItems() {
		if strings.HasPrefix(p.GetId(), ref) || p.GetMetadata().GetName() == ref {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no pod has the id or name %q; `cri-vz ps -a` lists them", ref)
	case 1:
		return found[0], nil
	}
	return nil, fmt.Errorf("%q means %d pods; give an id", ref, len(found))
}

// maxGrace keeps a grace period in seconds within what a time.Duration holds.
const maxGrace = 365 * 24 * 3600

// removePod stops a pod's containers, then the pod, and removes everything; it
// is bounded, and goes on to the end whatever fails on the way. The end of hurry
// is the end of the containers' grace period.
func (c *client) removePod(ctx, hurry context.Context, pod *runtimeapi.PodSandbox, grace int64) error {
	grace = min(max(grace, 0), maxGrace)
	ctx, cancel := context.WithTimeout(ctx, stopTimeout+time.Duration(grace)*time.Second)
	defer cancel()
	cts, err := c.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: pod.GetId()}})
	errs := []error{err}
	patient, hurried := context.WithCancel(ctx)
	defer hurried()
	defer context.AfterFunc(hurry, hurried)()
	for _, ct := range cts.GetContainers() {
		_, err := c.StopContainer(patient, &runtimeapi.StopContainerRequest{ContainerId: ct.GetId(), Timeout: grace})
		if hurry.Err() != nil {
			break // what still runs ends with its pod
		}
		errs = append(errs, err)
	}
	_, err = c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod.GetId()})
	errs = append(errs, err)
	_, err = c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod.GetId()})
	errs = append(errs, err)
	// Other clients' logs are theirs.
	if pod.GetMetadata().GetNamespace() == runNamespace {
		dir, err := c.logDir(ctx, pod.GetMetadata())
		if err == nil {
			err = os.RemoveAll(dir)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
