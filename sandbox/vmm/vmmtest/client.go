package vmmtest

import (
	"testing"

	"github.com/cri-vz/cri-vz/sandbox/vmm"
)

// Client sends commands to testinit in a guest, for tests of a driver's own.
type Client struct{ c *client }

// Await returns when the guest of m obeys, whose init is [Init]'s.
func Await(t testing.TB, m vmm.Machine) *Client {
	t.Helper()
	return &Client{(&machine{Machine: m}).waitReady(t)}
}

// Do returns a command's result; an error ends the test.
func (c *Client) Do(t testing.TB, format string, args ...any) string {
	t.Helper()
	return c.c.do(t, format, args...)
}

// Try returns a command's result or the guest's error.
func (c *Client) Try(t testing.TB, format string, args ...any) (string, error) {
	t.Helper()
	return c.c.try(t, format, args...)
}
