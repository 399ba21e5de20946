// Package api is the gRPC service that a cri-vz node offers beside the CRI, for
// its own command line.
package api

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative node.proto
