package cri

import (
	"context"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ImageFsInfo implements the CRI call of that name. The mountpoint is a host
// path, always (T41): a guest's path would break the stats of the whole node.
func (s *Server) ImageFsInfo(context.Context, *runtimeapi.ImageFsInfoRequest) (*runtimeapi.ImageFsInfoResponse, error) {
	bytes, inodes, err := s.Images.Usage()
	if err != nil {
		return nil, err
	}
	images := &runtimeapi.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: s.ImageRoot},
		UsedBytes:  &runtimeapi.UInt64Value{Value: bytes},
		InodesUsed: &runtimeapi.UInt64Value{Value: inodes},
	}
	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems: []*runtimeapi.FilesystemUsage{images},
		// Writable layers lie on the pods' scratch disks, on the same file system.
		ContainerFilesystems: []*runtimeapi.FilesystemUsage{images},
	}, nil
}
