//go:build linux

package node_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// cluster is etcd and the control plane, all on loopback.
type cluster struct {
	dir      string
	ca       *x509.Certificate
	caKey    *ecdsa.PrivateKey
	programs []*program
}

const (
	etcdURL      = "http://127.0.0.1:2379"
	apiServerURL = "https://127.0.0.1:6443"
)

// tokens of the API server's clients, whose names the kubeconfigs have. Nobody
// else is in the network namespace.
var clients = []struct{ name, token, user, group string }{
	{"admin", "token-of-admin", "admin", "system:masters"},
	{"kubelet", "token-of-kubelet", "system:node:" + nodeName, "system:nodes"},
}

func startCluster() (func() error, error) {
	c := &cluster{dir: filepath.Join(suite.base, "cluster")}
	suite.cluster = c
	if err := errors.Join(os.Mkdir(c.dir, 0o755), c.writeFiles()); err != nil {
		return nil, err
	}
	undo := func() error {
		var errs []error
		for i := len(c.programs) - 1; i >= 0; i-- {
			errs = append(errs, c.programs[i].stop())
		}
		return errors.Join(errs...)
	}
	for _, p := range []struct {
		name  string
		args  []string
		ready func() error
	}{
		{"etcd", []string{
			"--data-dir=" + c.path("etcd"), "--listen-client-urls=" + etcdURL, "--advertise-client-urls=" + etcdURL,
			"--listen-peer-urls=http://127.0.0.1:2380", "--unsafe-no-fsync", "--log-level=warn",
		}, func() error { return c.healthy(etcdURL + "/health") }},
		{"kube-apiserver", []string{
			"--etcd-servers=" + etcdURL, "--bind-address=127.0.0.1", "--secure-port=6443", "--advertise-address=" + address,
			"--tls-cert-file=" + c.path("apiserver.crt"), "--tls-private-key-file=" + c.path("apiserver.key"), "--cert-dir=" + c.dir,
			"--client-ca-file=" + c.path("ca.crt"), "--token-auth-file=" + c.path("tokens"),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=198.51.100.0/24",
			"--service-account-key-file=" + c.path("accounts.pub"), "--service-account-signing-key-file=" + c.path("accounts.key"),
			"--kubelet-certificate-authority=" + c.path("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--kubelet-client-certificate=" + c.path("client.crt"), "--kubelet-client-key=" + c.path("client.key"),
		}, func() error { return c.healthy(apiServerURL + "/readyz") }},
		{"kube-controller-manager", []string{
			"--kubeconfig=" + c.kubeconfig("admin"), "--leader-elect=false", "--secure-port=0",
			"--root-ca-file=" + c.path("ca.crt"), "--service-account-private-key-file=" + c.path("accounts.key"),
		}, func() error { _, err := kubectl("-n", "default", "get", "serviceaccount", "default"); return err }},
		{"kube-scheduler", []string{
			"--kubeconfig=" + c.kubeconfig("admin"), "--leader-elect=false", "--secure-port=0",
		}, func() error { return nil }},
	} {
		started, err := startProgram(p.name, filepath.Join(suite.bin, p.name), p.args, 2*time.Minute, p.ready)
		if err != nil {
			return undo, err
		}
		c.programs = append(c.programs, started)
	}
	return undo, nil
}

func (c *cluster) path(name string) string       { return filepath.Join(c.dir, name) }
func (c *cluster) kubeconfig(name string) string { return c.path(name + ".kubeconfig") }

// healthy asks a health endpoint as the administrator.
func (c *cluster) healthy(url string) error {
	pool := x509.NewCertPool()
	pool.AddCert(c.ca)
	client := &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true},
	}
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+clients[0].token)
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, resp.Status)
	}
	return nil
}

// writeFiles makes keys, certificates, tokens and kubeconfigs.
func (c *cluster) writeFiles() error {
	var err error
	if c.caKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	template := certificate("ca")
	template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, c.caKey.Public(), c.caKey)
	if err != nil {
		return err
	}
	if c.ca, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	accounts, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	accountsPublic, err := x509.MarshalPKIXPublicKey(accounts.Public())
	if err != nil {
		return err
	}
	var tokens []byte
	for _, who := range clients {
		tokens = fmt.Appendf(tokens, "%s,%s,%s,%s\n", who.token, who.user, who.user, who.group)
		config := fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: test, user: {token: %q}}]
contexts: [{name: test, context: {cluster: test, user: test}}]
current-context: test
`, apiServerURL, c.path("ca.crt"), who.token)
		if err := os.WriteFile(c.kubeconfig(who.name), config, 0o600); err != nil {
			return err
		}
	}
	return errors.Join(
		os.WriteFile(c.path("tokens"), tokens, 0o600),
		writePEM(c.path("ca.crt"), "CERTIFICATE", der),
		writeKey(c.path("accounts.key"), accounts),
		writePEM(c.path("accounts.pub"), "PUBLIC KEY", accountsPublic),
		c.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, "127.0.0.1", address),
		c.issue("client", pkix.Name{CommonName: "kube-apiserver", Organization: []string{"system:masters"}}),
		c.issue("kubelet", pkix.Name{CommonName: nodeName}, address, "127.0.0.1"),
	)
}

// issue writes <name>.crt, valid for the addresses and as a client, and <name>.key.
func (c *cluster) issue(name string, subject pkix.Name, addresses ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := certificate("")
	template.Subject, template.KeyUsage = subject, x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, a := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(a))
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.ca, key.Public(), c.caKey)
	if err != nil {
		return err
	}
	return errors.Join(writePEM(c.path(name+".crt"), "CERTIFICATE", der), writeKey(c.path(name+".key"), key))
}

func certificate(name string) *x509.Certificate {
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
}

func writeKey(path string, key *ecdsa.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return writePEM(path, "PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
