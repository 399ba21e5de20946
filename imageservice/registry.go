package imageservice

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// retryPolicy bounds how long a registry is given.
type retryPolicy struct {
	// attempts is how often in a row a request may fail without a byte gained.
	attempts int
	// first is the pause after the first failure; it doubles up to max.
	first, max time.Duration
	// resumes bounds the connections that one blob may take altogether.
	resumes int
	// stall is how long a transfer may stand still, and how long a server may
	// take to begin its answer.
	stall time.Duration
}

// A pull is given about 15 s of failures in a row: kubelet tries again itself,
// with its own back-off.
var defaultRetry = retryPolicy{attempts: 5, first: 500 * time.Millisecond, max: 10 * time.Second, resumes: 100, stall: time.Minute}

// userAgent tells a registry's operator who asks.
const userAgent = "cri-vz"

// repository is the source of one pull: the servers that may have it.
type repository struct {
	ref       imageRef
	endpoints []endpoint
	auth      *runtimeapi.AuthConfig
	retry     retryPolicy
	limits    *Limits

	mu      sync.Mutex
	clients map[string]*http.Client
	closers []func()
}

// close ends the pull's idle connections.
func (r *repository) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.closers {
		c()
	}
}

// client makes, once, the authenticated client for an endpoint.
func (r *repository) client(ctx context.Context, ep endpoint) (*http.Client, error) {
	key := ep.scheme + "://" + ep.host + ep.api
	r.mu.Lock()
	c := r.clients[key]
	r.mu.Unlock()
	if c != nil {
		return c, nil
	}
	auth, err := credentialsFor(ctx, r.auth, r.ref.domain, ep.host, r.ref.path)
	if err != nil {
		return nil, err
	}
	var opts []name.Option
	if ep.scheme == "http" || ep.plainToo {
		opts = append(opts, name.Insecure)
	}
	reg, err := name.NewRegistry(ep.host, opts...)
	if err != nil {
		return nil, invalidf("registry host %q: %v", ep.host, err)
	}
	base := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:       ep.tls,
		TLSHandshakeTimeout:   30 * time.Second,
		ResponseHeaderTimeout: r.retry.stall,
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   maxParallelDownloads,
		IdleConnTimeout:       30 * time.Second,
		// A layer is compressed already, and its digest is of what is sent.
		DisableCompression: true,
	}
	pinned := &pinnedTransport{inner: base, ep: ep, limit: max(r.limits.ManifestBytes, r.limits.ConfigBytes) + 1}
	if !sameRegistry(ep.host, r.ref.domain) {
		pinned.namespace = r.ref.domain
	}
	rt, err := transport.NewWithContext(ctx, reg, auth, transport.NewUserAgent(pinned, userAgent), []string{"repository:" + r.ref.path + ":pull"})
	if err != nil {
		base.CloseIdleConnections()
		return nil, err
	}
	c = &http.Client{Transport: rt, CheckRedirect: ep.checkRedirect}
	r.mu.Lock()
	defer r.mu.Unlock()
	if have := r.clients[key]; have != nil {
		base.CloseIdleConnections()
		return have, nil
	}
	if r.clients == nil {
		r.clients = map[string]*http.Client{}
	}
	r.clients[key] = c
	r.closers = append(r.closers, base.CloseIdleConnections)
	return c, nil
}

// checkRedirect lets a registry send the client to its blob storage, but not
// down to plain HTTP and not from the outside to an address inside.
func (ep endpoint) checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	if req.URL.Scheme != "https" && via[0].URL.Scheme == "https" {
		return fmt.Errorf("registry %s redirects from https to %s", ep.host, req.URL.Scheme)
	}
	from, to := via[0].URL.Hostname(), req.URL.Hostname()
	if from != to && isPrivateHost(to) && !isPrivateHost(from) {
		return fmt.Errorf("registry %s redirects to the private address %s", ep.host, to)
	}
	return nil
}

func isPrivateHost(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && (ip.Unmap().IsPrivate() || ip.Unmap().IsLoopback() || ip.Unmap().IsLinkLocalUnicast() || ip.IsUnspecified())
}

// pinnedTransport holds requests to what the endpoint allows, whatever the
// layers above it try: its scheme, its path, and bounded answers.
type pinnedTransport struct {
	inner http.RoundTripper
	ep    endpoint
	limit int64
	// namespace tells a mirror which registry is meant (containerd's ns).
	namespace string
}

// maxErrorBytes of what a registry says about an error end up in ours.
const maxErrorBytes = 4 << 10

// blobKey marks the context of a request whose answer may be large.
type blobKey struct{}

func (t *pinnedTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	ping := false
	if req.URL.Host == t.ep.host {
		if req.URL.Scheme != t.ep.scheme && !t.ep.plainToo {
			return nil, fmt.Errorf("%s is configured for %s, not %s", t.ep.host, t.ep.scheme, req.URL.Scheme)
		}
		rest, ok := strings.CutPrefix(req.URL.Path, "/v2/")
		switch {
		case ok && rest == "" && t.ep.override:
			// The question for credentials: what answers at an overridden path
			// is often no registry by itself, and its host is one or nothing.
			ping = true
		case ok:
			req.URL.Path = t.ep.api + "/" + rest
			req.URL.RawPath = ""
			if t.namespace != "" {
				q := req.URL.Query()
				q.Set("ns", t.namespace)
				req.URL.RawQuery = q.Encode()
			}
		}
	}
	resp, err := t.inner.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if ping && resp.StatusCode == http.StatusNotFound {
		resp.StatusCode, resp.Status = http.StatusOK, "200 OK"
	}
	limit := t.limit
	switch {
	case resp.StatusCode >= 400:
		limit = maxErrorBytes
	case req.Context().Value(blobKey{}) != nil:
		return resp, nil
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, limit), resp.Body}
	return resp, nil
}

// statusError classifies what a registry answered.
func statusError(resp *http.Response, want ...int) error {
	err := transport.CheckError(resp, want...)
	if err == nil {
		return nil
	}
	return classify(err)
}

// classify gives an error of the registry or of the way there its class.
func classify(err error) error {
	err = redact(err)
	var terr *transport.Error
	if errors.As(err, &terr) {
		switch code := terr.StatusCode; {
		case code == http.StatusNotFound:
			return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		case code == http.StatusUnauthorized:
			return fmt.Errorf("%w: log in to the registry, or check the pull secret: %w", err, errdefs.ErrUnauthenticated)
		case code == http.StatusForbidden:
			return fmt.Errorf("%w: %w", err, errdefs.ErrPermissionDenied)
		case code == http.StatusTooManyRequests:
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		case code >= 500:
			return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
		}
		return err
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	var netErr net.Error
	var opErr *net.OpError
	if errors.As(err, &opErr) || errors.As(err, &netErr) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return err
}

// redact drops the query of a URL in an error: storage that a registry redirects
// to has its signatures there.
func redact(err error) error {
	var uerr *url.Error
	if errors.As(err, &uerr) {
		if u, perr := url.Parse(uerr.URL); perr == nil {
			u.RawQuery, u.User = "", nil
			uerr.URL = u.String()
		}
	}
	return err
}

// temporary reports whether asking again may help.
func temporary(err error) bool {
	var terr *transport.Error
	if errors.As(err, &terr) {
		switch terr.StatusCode {
		case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
			http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
			return true
		}
		return false
	}
	return errdefs.IsUnavailable(err)
}

// pause waits before attempt n (from 1) is repeated, or as long as the registry
// asked for.
func (r *repository) pause(ctx context.Context, n int, retryAfter time.Duration) error {
	d := min(r.retry.first<<(n-1), r.retry.max)
	if retryAfter > 0 {
		d = min(retryAfter, 3*r.retry.max)
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func retryAfter(resp *http.Response) time.Duration {
	if resp == nil {
		return 0
	}
	n, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || n < 0 || n > 3600 {
		return 0
	}
	return time.Duration(n) * time.Second
}

// document reads a manifest or config into memory, from the first endpoint that
// has it.
func (r *repository) document(ctx context.Context, kind, identifier, want string, limit int64) ([]byte, types.MediaType, error) {
	var errs []error
	for _, ep := range r.endpoints {
		if !ep.pull || want == "" && !ep.resolve {
			continue
		}
		b, mt, err := r.documentFrom(ctx, ep, kind, identifier, want, limit)
		if err == nil {
			return b, mt, nil
		}
		if ctx.Err() != nil {
			return nil, "", fmt.Errorf("%s: %w", ep.host, ctx.Err())
		}
		errs = append(errs, fmt.Errorf("%s: %w", ep.host, err))
	}
	return nil, "", endpointsFailed(errs, r.ref.domain)
}

// endpointsFailed keeps the class of the last, the registry itself.
func endpointsFailed(errs []error, domain string) error {
	switch len(errs) {
	case 0:
		return fmt.Errorf("no server of the registry configuration for %s has the capability: %w", domain, errdefs.ErrFailedPrecondition)
	case 1:
		return errs[0]
	}
	var before []string
	for _, err := range errs[:len(errs)-1] {
		before = append(before, err.Error())
	}
	return fmt.Errorf("%w (tried before it: %s)", errs[len(errs)-1], strings.Join(before, "; "))
}

func (r *repository) documentFrom(ctx context.Context, ep endpoint, kind, identifier, want string, limit int64) ([]byte, types.MediaType, error) {
	for n := 1; ; n++ {
		b, mt, wait, err := r.tryDocument(ctx, ep, kind, identifier, want, limit)
		if err == nil {
			return b, mt, nil
		}
		if n >= r.retry.attempts || !temporary(err) || ctx.Err() != nil {
			if n > 1 {
				err = fmt.Errorf("%w (after %d attempts)", err, n)
			}
			return nil, "", err
		}
		klog.V(2).InfoS("Registry request failed, trying again", "host", ep.host, "image", r.ref.String(), "attempt", n, "err", err)
		if err := r.pause(ctx, n, wait); err != nil {
			return nil, "", err
		}
	}
}

func (r *repository) tryDocument(ctx context.Context, ep endpoint, kind, identifier, want string, limit int64) (_ []byte, _ types.MediaType, wait time.Duration, _ error) {
	ctx, cancel := context.WithTimeoutCause(ctx, r.retry.stall, fmt.Errorf("no answer within %v: %w", r.retry.stall, errdefs.ErrUnavailable))
	defer cancel()
	client, err := r.client(ctx, ep)
	if err != nil {
		return nil, "", 0, causeOf(ctx, classify(err))
	}
	u := url.URL{Scheme: ep.scheme, Host: ep.host, Path: "/v2/" + r.ref.path + "/" + kind + "/" + identifier}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, "", 0, err
	}
	if kind == "manifests" {
		for _, t := range manifestTypes {
			req.Header.Add("Accept", string(t))
		}
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, "", 0, causeOf(ctx, classify(err))
	}
	defer resp.Body.Close()
	if err := statusError(resp, http.StatusOK); err != nil {
		return nil, "", retryAfter(resp), err
	}
	b, err := readCapped(kind+" "+identifier, resp.Body, limit)
	if err != nil {
		return nil, "", 0, causeOf(ctx, classify(err))
	}
	if got := digestBytes(b); want != "" && got != want {
		return nil, "", 0, digestMismatch(kind+" "+identifier, got, want)
	}
	mt, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return b, types.MediaType(strings.TrimSpace(mt)), 0, nil
}

// causeOf says why a context of ours ended, where it did.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil && errdefs.IsUnavailable(cause) {
		return cause
	}
	return err
}

// blob downloads d into t, resuming where a connection broke, and checks its
// size and digest. progress counts bytes, negative ones when it starts over.
func (r *repository) blob(ctx context.Context, d v1.Descriptor, t *tempFile, progress func(int64)) error {
	dl := &download{repo: r, desc: d, file: t, hash: sha256.New(), progress: progress}
	var errs []error
	for _, ep := range r.endpoints {
		if !ep.pull {
			continue
		}
		err := dl.from(ctx, ep)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errdefs.IsResourceExhausted(err) || errors.Is(err, errDisk) {
			return err
		}
		errs = append(errs, fmt.Errorf("%s: %w", ep.host, err))
		if errdefs.IsDataLoss(err) {
			if err := dl.restart(); err != nil {
				return err
			}
		}
	}
	return endpointsFailed(errs, r.ref.domain)
}
