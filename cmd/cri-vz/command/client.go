package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
)

// callTimeout bounds calls that have no reason to take long.
const callTimeout = 30 * time.Second

// client is a connection to the daemon, made on first use.
type client struct {
	endpoint string

	runtimeapi.RuntimeServiceClient
	images runtimeapi.ImageServiceClient
	node   nodeapi.NodeClient
}

func defaultEndpoint() string {
	if s := os.Getenv("CRI_VZ_SOCKET"); s != "" {
		return s
	}
	if runtime.GOOS == "darwin" {
		if home, err := os.UserHomeDir(); err == nil {
			return "unix://" + filepath.Join(home, ".cri-vz", "cri-vz.sock")
		}
	}
	return "unix:///run/cri-vz/cri-vz.sock"
}

// connect makes the connection for every command that needs the daemon.
func (c *client) connect(*cobra.Command, []string) error {
	path := strings.TrimPrefix(c.endpoint, "unix://")
	if !filepath.IsAbs(path) {
		return fmt.Errorf("--connect %q is not unix:// and an absolute path", c.endpoint)
	}
	// Dial once by hand: gRPC's own error for a missing socket takes long and
	// says little.
	probe, err := net.DialTimeout("unix", path, 5*time.Second)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no daemon at %s: start one with `cri-vz serve`, or name its socket with --connect", path)
	case err != nil:
		return fmt.Errorf("the daemon at %s does not answer (is it running, may you open the socket?): %w", path, err)
	}
	probe.Close()
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// As the server has it.
		grpc.WithInitialWindowSize(1<<20), grpc.WithInitialConnWindowSize(4<<20),
		grpc.WithReadBufferSize(256<<10), grpc.WithWriteBufferSize(256<<10),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return fmt.Errorf("connect to %s: %w", path, err)
	}
	c.RuntimeServiceClient = runtimeapi.NewRuntimeServiceClient(conn)
	c.images = runtimeapi.NewImageServiceClient(conn)
	c.node = nodeapi.NewNodeClient(conn)
	return nil
}

// message is an error without gRPC's wrapping: what the daemon said.
func message(err error) string {
	if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
		if s.Code() == codes.Unavailable && strings.Contains(s.Message(), "error reading from server") {
			return "the daemon went away during the call: " + s.Message()
		}
		return s.Message()
	}
	return err.Error()
}

// output is the -o flag of commands that print tables.
type output string

func (o *output) flag(cmd *cobra.Command) {
	cmd.Flags().StringVarP((*string)(o), "output", "o", "table", "table or json")
}

// print writes rows as a table or v as JSON.
func (o output) print(w io.Writer, v any, header string, rows [][]string) error {
	switch o {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(v)
	case "table":
		tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(tw, header)
		for _, r := range rows {
			for i := range r {
				r[i] = printable(r[i])
			}
			fmt.Fprintln(tw, strings.Join(r, "\t"))
		}
		return tw.Flush()
	}
	return fmt.Errorf("-o %s: there are table and json", o)
}

// printable replaces what a terminal would act on: names and messages come from
// clients and images.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '·'
		}
		return r
	}, s)
}

// printableLines is printable for what may have several lines.
func printableLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = printable(l)
	}
	return strings.Join(lines, "\n")
}

func age(nanos int64) string {
	d := time.Since(time.Unix(0, nanos))
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func shortID(id string) string {
	return id[:min(len(id), 12)]
}

// findContainer takes what a person types: a container's id or the beginning of
// one, or the name of a pod or container that runs once.
func (c *client) findContainer(ctx context.Context, ref string) (*runtimeapi.Container, error) {
	if ref == "" { // which is the beginning of every id
		return nil, errors.New("the container's id or name is empty; `cri-vz ps -a` lists them")
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	all, err := c.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	pods, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, err
	}
	podNames := map[string]string{}
	for _, p := range pods.GetItems() {
		podNames[p.GetId()] = p.GetMetadata().GetName()
	}
	var running, rest []*runtimeapi.Container
	for _, ct := range all.GetContainers() {
		switch {
		case ct.GetId() == ref:
			return ct, nil
		case strings.HasPrefix(ct.GetId(), ref), strings.HasPrefix(ct.GetPodSandboxId(), ref),
			ct.GetMetadata().GetName() == ref, podNames[ct.GetPodSandboxId()] == ref:
			if ct.GetState() == runtimeapi.ContainerState_CONTAINER_RUNNING {
				running = append(running, ct)
			} else {
				rest = append(rest, ct)
			}
		}
	}
	found := running
	if len(found) == 0 {
		found = rest
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no container or pod has the id or name %q; `cri-vz ps -a` lists them", ref)
	case 1:
		return found[0], nil
	}
	var names []string
	for _, ct := range found {
		names = append(names, shortID(ct.GetId())+" ("+printable(ct.GetMetadata().GetName())+")")
	}
	return nil, fmt.Errorf("%q means %d containers: %s; give an id", ref, len(found), strings.Join(names, ", "))
}
