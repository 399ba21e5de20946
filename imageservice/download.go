package imageservice

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"k8s.io/klog/v2"
)

// errDisk marks a failure of our own disk, which no other server cures.
var errDisk = errors.New("write to the image store")

// download is a blob on its way. What has arrived counts for every server, as
// the digest in the end vouches for all of it.
type download struct {
	repo     *repository
	desc     v1.Descriptor
	file     *tempFile
	hash     hash.Hash
	offset   int64
	requests int
	progress func(int64)
}

// restart forgets what has arrived.
func (d *download) restart() error {
	d.progress(-d.offset)
	d.offset = 0
	d.hash.Reset()
	if err := d.file.Truncate(0); err != nil {
		return fmt.Errorf("%w: %w", errDisk, diskError(d.file.Name(), err))
	}
	if _, err := d.file.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("%w: %w", errDisk, diskError(d.file.Name(), err))
	}
	return nil
}

func (d *download) from(ctx context.Context, ep endpoint) error {
	failures := 0
	for {
		before := d.offset
		wait, err := d.request(ctx, ep)
		if err == nil {
			if got := digestOf(d.hash); got != d.desc.Digest.String() {
				return digestMismatch("blob "+d.desc.Digest.String(), got, d.desc.Digest.String())
			}
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if d.offset > before {
			failures = 0
		}
		failures++
		if failures >= d.repo.retry.attempts || d.requests >= d.repo.retry.resumes || !temporary(err) {
			return fmt.Errorf("blob %s: %w (%d of %d bytes after %d requests)", d.desc.Digest, err, d.offset, d.desc.Size, d.requests)
		}
		klog.V(2).InfoS("Download broke off, resuming", "host", ep.host, "blob", d.desc.Digest.String(), "at", d.offset, "size", d.desc.Size, "err", err)
		if err := d.repo.pause(ctx, failures, wait); err != nil {
			return err
		}
	}
}

// request fetches from the offset to the end, over one connection.
func (d *download) request(ctx context.Context, ep endpoint) (wait time.Duration, err error) {
	d.requests++
	if d.offset == d.desc.Size && d.offset > 0 {
		return 0, nil
	}
	stall := d.repo.retry.stall
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(stall, func() {
		cancel(fmt.Errorf("no byte arrived within %v: %w", stall, errdefs.ErrUnavailable))
	})
	defer timer.Stop()
	client, err := d.repo.client(ctx, ep)
	if err != nil {
		return 0, causeOf(ctx, classify(err))
	}
	u := url.URL{Scheme: ep.scheme, Host: ep.host, Path: "/v2/" + d.repo.ref.path + "/blobs/" + d.desc.Digest.String()}
	req, err := http.NewRequestWithContext(context.WithValue(ctx, blobKey{}, true), http.MethodGet, u.String(), nil)
	if err != nil {
		return 0, err
	}
	if d.offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", d.offset, d.desc.Size-1))
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, causeOf(ctx, classify(err))
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusPartialContent && d.offset > 0:
		var start, end int64
		if _, err := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d", &start, &end); err != nil || start != d.offset {
			// An odd server: what it sends can't be placed. From the start, then.
			return 0, errors.Join(d.restart(), fmt.Errorf("the server answers with the wrong range %q: %w", resp.Header.Get("Content-Range"), errdefs.ErrUnavailable))
		}
	case resp.StatusCode == http.StatusOK:
		if d.offset > 0 {
			// It does not do ranges.
			if err := d.restart(); err != nil {
				return 0, err
			}
		}
	default:
		err := statusError(resp, http.StatusOK)
		if err == nil {
			err = fmt.Errorf("unexpected status %s", resp.Status)
		}
		return retryAfter(resp), err
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := resp.Body.Read(buf)
		if n > 0 {
			timer.Reset(stall)
			if d.offset+int64(n) > d.desc.Size {
				return 0, fmt.Errorf("the server sends more than the %d bytes that the manifest says: %w", d.desc.Size, errdefs.ErrDataLoss)
			}
			if _, werr := d.file.Write(buf[:n]); werr != nil {
				return 0, fmt.Errorf("%w: %w", errDisk, diskError(d.file.Name(), werr))
			}
			d.hash.Write(buf[:n])
			d.offset += int64(n)
			d.progress(int64(n))
		}
		if err == io.EOF {
			if d.offset < d.desc.Size {
				return 0, fmt.Errorf("the connection ended early: %w: %w", io.ErrUnexpectedEOF, errdefs.ErrUnavailable)
			}
			return 0, nil
		}
		if err != nil {
			return 0, causeOf(ctx, classify(err))
		}
	}
}
