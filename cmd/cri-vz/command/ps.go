package command

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func newPs(c *client) *cobra.Command {
	var out output
	var all bool
	cmd := &cobra.Command{
		Use:     "ps",
		Short:   "List pods and their containers",
		Args:    cobra.NoArgs,
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, _ []string) error {
			list, err := c.ps(cmd.Context(), all)
			if err != nil {
				return err
			}
			rows := [][]string{}
			for _, p := range list {
				pod := []string{shortID(p.ID), p.Name, p.State, p.IP}
				if len(p.Containers) == 0 {
					rows = append(rows, append(pod, "", "", "", age(p.CreatedAt)))
				}
				for _, ct := range p.Containers {
					rows = append(rows, append(pod, shortID(ct.ID), ct.Name, ct.State, age(ct.CreatedAt)))
					pod = []string{"", "", "", ""}
				}
			}
			return out.print(cmd.OutOrStdout(), list, "POD\tNAME\tSTATE\tIP\tCONTAINER\tNAME\tSTATE\tAGE", rows)
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also pods that are not ready and containers that ended")
	out.flag(cmd)
	return cmd
}

type psPod struct {
	ID         string        `json:"id"`
	Name       string        `json:"name"`
	Namespace  string        `json:"namespace"`
	State      string        `json:"state"`
	IP         string        `json:"ip"`
	CreatedAt  int64         `json:"createdAt"`
	Containers []psContainer `json:"containers"`
}

type psContainer struct {
	ID        string `json:"id"`
	Name      string `json:"name"`
	State     string `json:"state"`
	Image     string `json:"image"`
	CreatedAt int64  `json:"createdAt"`
}

func (c *client) ps(ctx context.Context, all bool) ([]psPod, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	pods, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	cts, err := c.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	list := []psPod{}
	for _, p := range pods.GetItems() {
		if !all && p.GetState() != runtimeapi.PodSandboxState_SANDBOX_READY {
			continue
		}
		row := psPod{
			ID: p.GetId(), Name: p.GetMetadata().GetName(), Namespace: p.GetMetadata().GetNamespace(),
			State: stateName(p.GetState().String(), "SANDBOX_"), CreatedAt: p.GetCreatedAt(), Containers: []psContainer{},
		}
		st, err := c.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.GetId()})
		if err == nil { // else it was removed just now
			row.IP = st.GetStatus().GetNetwork().GetIp()
		}
		for _, ct := range cts.GetContainers() {
			ended := ct.GetState() == runtimeapi.ContainerState_CONTAINER_EXITED
			if ct.GetPodSandboxId() != p.GetId() || (ended && !all) {
				continue
			}
			row.Containers = append(row.Containers, psContainer{
				ID: ct.GetId(), Name: ct.GetMetadata().GetName(), State: stateName(ct.GetState().String(), "CONTAINER_"),
				Image: ct.GetImage().GetImage(), CreatedAt: ct.GetCreatedAt(),
			})
		}
		list = append(list, row)
	}
	return list, nil
}

func stateName(s, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(s, prefix))
}
