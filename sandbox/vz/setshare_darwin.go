//go:build cgo && !fakevz

package vz

import (
	"fmt"
	"reflect"
	"runtime"
	"sync"

	"github.com/Code-Hex/vz/v3"
	"github.com/containerd/errdefs"
	"github.com/ebitengine/purego"
	"github.com/ebitengine/purego/objc"
)

// The framework lets the share of a running VZVirtioFileSystemDevice be replaced
// (macOS 12); vz v3.7.1 does not. Two unexported fields of its types are all that is
// missing: hack/typecheck has a test that they are where this file looks for them.

// objcObject is the Objective-C object of one of vz's.
func objcObject(v any) objc.ID {
	p := reflect.ValueOf(v).Elem().FieldByName("pointer").Elem().FieldByName("_ptr")
	return objc.ID(uintptr(p.UnsafePointer()))
}

func dispatchQueue(vm *vz.VirtualMachine) uintptr {
	return uintptr(reflect.ValueOf(vm).Elem().FieldByName("dispatchQueue").UnsafePointer())
}

// onQueue calls f on a dispatch queue, on which all of a machine's methods have to be
// called, and returns when f has.
var onQueue = sync.OnceValues(func() (func(queue uintptr, f func()), error) {
	sym, err := purego.Dlsym(purego.RTLD_DEFAULT, "dispatch_sync_f")
	if err != nil {
		return nil, fmt.Errorf("dispatch_sync_f: %w", err)
	}
	var dispatchSync func(queue, context, function uintptr)
	purego.RegisterFunc(&dispatchSync, sym)
	var mu sync.Mutex
	calls, last := map[uintptr]func(){}, uintptr(0)
	// One callback for good: purego never frees them.
	callback := purego.NewCallback(func(context uintptr) {
		mu.Lock()
		f := calls[context]
		mu.Unlock()
		f()
	})
	return func(queue uintptr, f func()) {
		mu.Lock()
		last++
		context := last
		calls[context] = f
		mu.Unlock()
		dispatchSync(queue, context, callback)
		mu.Lock()
		delete(calls, context)
		mu.Unlock()
	}, nil
})

// selectors are what the run-time library knows the methods by.
var selectors = sync.OnceValue(func() (s struct{ devices, balloons, count, objectAtIndex, tag, utf8, setShare, setMemory objc.SEL }) {
	s.devices = objc.RegisterName("directorySharingDevices")
	s.balloons = objc.RegisterName("memoryBalloonDevices")
	s.count = objc.RegisterName("count")
	s.objectAtIndex = objc.RegisterName("objectAtIndex:")
	s.tag = objc.RegisterName("tag")
	s.utf8 = objc.RegisterName("UTF8String")
	s.setShare = objc.RegisterName("setShare:")
	s.setMemory = objc.RegisterName("setTargetVirtualMachineMemorySize:")
	return s
})

// canSetShare says why setShare can't work.
func canSetShare() error {
	_, err := onQueue()
	return err
}

// setShare replaces what the running machine's virtiofs device shows.
func setShare(vm *vz.VirtualMachine, tag string, share vz.DirectoryShare) error {
	call, err := onQueue()
	if err != nil {
		return err
	}
	s := selectors()
	machine := objcObject(vm)
	err = fmt.Errorf("the machine has no virtiofs device %q: %w", tag, errdefs.ErrNotFound)
	call(dispatchQueue(vm), func() {
		devices := machine.Send(s.devices)
		for i, n := uint(0), objc.Send[uint](devices, s.count); i < n; i++ {
			device := objc.Send[objc.ID](devices, s.objectAtIndex, i)
			if objc.Send[string](device.Send(s.tag), s.utf8) == tag {
				device.Send(s.setShare, objcObject(share))
				err = nil
			}
		}
	})
	// Their finalizers release the objects.
	runtime.KeepAlive(vm)
	runtime.KeepAlive(share)
	return err
}

// setMemory sets the target of the running machine's balloon. vz can do that too, with
// devices that it releases once too often.
func setMemory(vm *vz.VirtualMachine, bytes int64) error {
	call, err := onQueue()
	if err != nil {
		return err
	}
	s := selectors()
	machine := objcObject(vm)
	err = fmt.Errorf("the machine has no balloon: %w", errdefs.ErrNotFound)
	call(dispatchQueue(vm), func() {
		devices := machine.Send(s.balloons)
		if objc.Send[uint](devices, s.count) > 0 {
			objc.Send[objc.ID](devices, s.objectAtIndex, uint(0)).Send(s.setMemory, uint64(bytes))
			err = nil
		}
	})
	runtime.KeepAlive(vm)
	return err
}
