// Mkimage writes the demo's image, a small web server, as `docker save` would.
//
//	go run ./test/images/cmd/mkimage -o demo.tar.gz
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"

	"github.com/cri-vz/cri-vz/test/images"
)

func main() {
	out := flag.String("o", "demo.tar.gz", "file to write; .gz compresses it")
	ref := flag.String("ref", "docker.io/library/demo:latest", "tag of the image")
	arch := flag.String("arch", runtime.GOARCH, "GOARCH of the image")
	oci := flag.Bool("oci", false, "write an OCI layout instead of docker's archive")
	layered := flag.Bool("layered", false, "write the image with whiteouts and other hard cases")
	flag.Parse()
	if err := write(*out, *ref, *arch, *oci, *layered); err != nil {
		fmt.Fprintln(os.Stderr, "mkimage:", err)
		os.Exit(1)
	}
}

func write(out, ref, arch string, oci, layered bool) error {
	dir, err := os.MkdirTemp("", "mkimage-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	build := images.WebServer
	if layered {
		build = images.Layered
	}
	img, err := build(dir, arch)
	if err != nil {
		return err
	}
	if oci {
		return images.SaveOCI(out, ref, img)
	}
	return images.SaveDockerArchive(out, ref, img)
}
