package imageservice

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/url"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// dockerHub are the names of one and the same registry.
var dockerHub = map[string]bool{"docker.io": true, "index.docker.io": true, "registry-1.docker.io": true}

func sameRegistry(a, b string) bool {
	a, b = strings.ToLower(a), strings.ToLower(b)
	return a == b || dockerHub[a] && dockerHub[b]
}

// credentialsFor returns what to show host, which answers for domain. The CRI's
// AuthConfig is for the host that it names, else for the registry of the
// reference: a mirror never sees it. Without one, docker's config.json is asked
// for this very host.
func credentialsFor(ctx context.Context, auth *runtimeapi.AuthConfig, domain, host, repo string) (authn.Authenticator, error) {
	if auth != nil && (auth.Username != "" || auth.Password != "" || auth.Auth != "" || auth.IdentityToken != "" || auth.RegistryToken != "") {
		meant := domain
		if auth.ServerAddress != "" {
			raw := auth.ServerAddress
			if !strings.Contains(raw, "://") {
				raw = "https://" + raw
			}
			u, err := url.Parse(raw)
			if err != nil || u.Host == "" {
				// The value may hold a secret that was put in the wrong field.
				return nil, invalidf("AuthConfig: server address is not a host or URL")
			}
			meant = u.Host
		}
		if !sameRegistry(meant, host) {
			return authn.Anonymous, nil
		}
		return fromCRI(auth)
	}
	key := host
	if dockerHub[host] {
		key = "index.docker.io"
	}
	a, err := authn.Resolve(ctx, authn.DefaultKeychain, keychainResource{key, key + "/" + repo})
	if err != nil {
		return nil, fmt.Errorf("credentials for %s from docker's config.json: %w", host, err)
	}
	return a, nil
}

func fromCRI(auth *runtimeapi.AuthConfig) (authn.Authenticator, error) {
	cfg := authn.AuthConfig{
		Username: auth.Username, Password: auth.Password,
		IdentityToken: auth.IdentityToken, RegistryToken: auth.RegistryToken,
	}
	if auth.Auth != "" && cfg.Username == "" && cfg.Password == "" {
		b, err := base64.StdEncoding.DecodeString(auth.Auth)
		user, pass, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return nil, invalidf("AuthConfig: auth is not base64 of user:password")
		}
		// Docker pads the password with NUL bytes.
		cfg.Username, cfg.Password = user, strings.Trim(pass, "\x00")
	}
	return authn.FromConfig(cfg), nil
}

// keychainResource names a repository to a keychain.
type keychainResource struct{ registry, full string }

func (r keychainResource) String() string      { return r.full }
func (r keychainResource) RegistryStr() string { return r.registry }
