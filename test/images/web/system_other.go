//go:build !linux

package main

import "errors"

func syscallMount(string, string, string) error {
	return errors.New("the images hold Linux programs")
}
