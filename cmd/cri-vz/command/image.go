package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	nodeapi "github.com/cri-vz/cri-vz/cri/api"
)

func newImage(c *client) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Load, pull, list and remove images"}
	cmd.AddCommand(newImageLoad(c), newImagePull(c), newImageList(c), newImageRemove(c))
	return cmd
}

func newImageLoad(c *client) *cobra.Command {
	return &cobra.Command{
		Use:   "load FILE...",
		Short: "Load images from docker-save or OCI-layout tars (plain, gzip, zstd); - reads standard input",
		Example: `  docker save app:1 | gzip > app.tar.gz
  cri-vz image load app.tar.gz`,
		Args:    cobra.MinimumNArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				imgs, err := c.load(cmd.Context(), cmd, name)
				if err != nil {
					return fmt.Errorf("load %s: %s", name, message(err))
				}
				for _, img := range imgs {
					fmt.Fprintf(cmd.OutOrStdout(), "%s  %s\n", shortImageID(img.GetId()), printable(strings.Join(img.GetRepoTags(), " ")))
				}
			}
			return nil
		},
	}
}

// load sends an archive to the daemon and shows how it gets on.
func (c *client) load(ctx context.Context, cmd *cobra.Command, name string) ([]*nodeapi.LoadedImage, error) {
	var in io.Reader = cmd.InOrStdin()
	var total int64
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if fi, err := f.Stat(); err == nil {
			if fi.IsDir() {
				return nil, errors.New("is a folder, not an image archive")
			}
			total = fi.Size()
		}
		in = f
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s, err := c.node.LoadImage(ctx)
	if err != nil {
		return nil, err
	}
	p := newProgress(cmd.ErrOrStderr())
	defer p.done()
	go func() {
		buf := make([]byte, 512<<10)
		var sent int64
		for {
			n, err := in.Read(buf)
			if n > 0 {
				if s.Send(&nodeapi.LoadImageRequest{Data: buf[:n]}) != nil {
					return // Recv below says why
				}
				sent += int64(n)
				p.update("send "+name, sent, total)
			}
			if errors.Is(err, io.EOF) {
				_ = s.CloseSend()
				return
			}
			if err != nil {
				cancel(fmt.Errorf("read the archive: %w", err))
				return
			}
		}
	}()
	var imgs []*nodeapi.LoadedImage
	for {
		m, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return imgs, nil
		case err != nil && ctx.Err() != nil:
			return nil, context.Cause(ctx) // what ended it here, not what the call makes of that
		case err != nil:
			return nil, err
		case m.GetImage() != nil:
			imgs = append(imgs, m.GetImage())
		default:
			p.update("load "+name+": "+m.GetWhat(), m.GetDoneBytes(), m.GetTotalBytes())
		}
	}
}

func newImagePull(c *client) *cobra.Command {
	return &cobra.Command{
		Use:     "pull IMAGE",
		Short:   "Pull an image from its registry",
		Args:    cobra.ExactArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := c.pull(cmd.Context(), cmd, args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), shortImageID(r))
			return err
		},
	}
}

func (c *client) pull(ctx context.Context, cmd *cobra.Command, ref string) (string, error) {
	p := newProgress(cmd.ErrOrStderr())
	defer p.done()
	s, err := c.node.Pull(ctx, &nodeapi.PullRequest{Image: ref})
	if err != nil {
		return "", err
	}
	for {
		m, err := s.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return "", errors.New("the daemon ended the pull without an image")
		case err != nil:
			return "", err
		case m.GetImageId() != "":
			return m.GetImageId(), nil
		}
		p.update("pull "+ref+": "+m.GetWhat(), m.GetDoneBytes(), m.GetTotalBytes())
	}
}

func newImageList(c *client) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List images",
		Args:    cobra.NoArgs,
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			r, err := c.images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
			if err != nil {
				return err
			}
			type row struct {
				ID      string   `json:"id"`
				Tags    []string `json:"tags"`
				Digests []string `json:"digests"`
				Size    uint64   `json:"size"`
			}
			list, rows := []row{}, [][]string{}
			for _, img := range r.GetImages() {
				// A program reads [] more easily than null.
				list = append(list, row{img.GetId(), append([]string{}, img.GetRepoTags()...), append([]string{}, img.GetRepoDigests()...), img.GetSize()})
				names := img.GetRepoTags()
				if len(names) == 0 {
					names = img.GetRepoDigests()
				}
				if len(names) == 0 {
					names = []string{"<none>"}
				}
				for _, n := range names {
					rows = append(rows, []string{n, shortImageID(img.GetId()), humanBytes(int64(img.GetSize()))})
				}
			}
			return out.print(cmd.OutOrStdout(), list, "IMAGE\tID\tSIZE", rows)
		},
	}
	out.flag(cmd)
	return cmd
}

func newImageRemove(c *client) *cobra.Command {
	return &cobra.Command{
		Use:     "remove IMAGE...",
		Aliases: []string{"rm"},
		Short:   "Remove images with all their names; containers made from them go on",
		Args:    cobra.MinimumNArgs(1),
		PreRunE: c.connect,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), callTimeout)
			defer cancel()
			for _, ref := range args {
				spec := &runtimeapi.ImageSpec{Image: ref}
				st, err := c.images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
				if err != nil {
					return err
				}
				if st.GetImage() == nil {
					return fmt.Errorf("no image %q; `cri-vz image list` lists them", ref)
				}
				if _, err := c.images.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: spec}); err != nil {
					return err
				}
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), printable(ref)); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func shortImageID(id string) string { return shortID(strings.TrimPrefix(id, "sha256:")) }
